"""Looking inside the memory: the page, the figure, and what they say."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from mann_ext import cli, figures, inspection
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.few_shot import FewShot
from mann_ext.inspection import SlotRows, TracedEpisode, trace_episode, write_page
from mann_ext.models import MANN
from tests.tiny_training import TINY, tiny, train_here


def task_and_model(**episodes: object) -> tuple[FewShot, MANN]:
    torch.manual_seed(0)
    config = dataclasses.replace(
        TINY,
        episodes=dataclasses.replace(TINY.episodes, **episodes),  # type: ignore[arg-type]
    )
    task = FewShot(config, torch.device("cpu"))
    model = task.model().eval()
    assert isinstance(model, MANN)
    return task, model


@pytest.fixture(scope="module")
def episode() -> TracedEpisode:
    return trace_episode(*task_and_model(), 5)


class Page(HTMLParser):
    """What is in a page: start tags, and the text of each script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.scripts: dict[str, str] = {}
        self.open: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "img", "input", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[self.tags[-1][1].get("type", "")] = data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(self.scripts["application/json"])


def numbers(text: str, *shape: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8).view(shape)


# The episode


@pytest.mark.parametrize("labels", ["one_hot", "string"])
def test_an_episode_is_one_of_those_the_evaluation_counts(labels):
    task, model = task_and_model(labels=labels)
    accuracy = task.held_out_accuracy(model, 8)
    for index in (0, 2, 7):
        episode = trace_episode(task, model, index)
        right = torch.tensor(episode.right, dtype=torch.float64)
        for instance in (1, 2, 3):
            now = episode.instances == instance
            assert accuracy.shown[index, instance - 1] == now.sum()
            assert accuracy.correct[index, instance - 1] == right[now].sum()


@pytest.mark.parametrize("labels", ["one_hot", "string"])
def test_probabilities_are_those_of_the_labels(labels):
    task, model = task_and_model(labels=labels)
    episode = trace_episode(task, model, 1)
    logits = task.logits(model, task.held_out_episode(1))[:, 0].softmax(-1)
    for t, label in enumerate(episode.labels):
        share = episode.probabilities[t, list(episode.names).index(label)].item()
        letters = [ord(letter) - ord("a") for letter in label] if labels == "string" else []
        expected = logits[t, int(label)] if not letters else logits[t, range(5), letters].prod()
        assert share == pytest.approx(expected.item(), rel=1e-5)
        assert episode.confidence[t] >= share * (1 - 1e-9)
        if episode.predictions[t] == label:
            assert episode.confidence[t].item() == pytest.approx(share)
    if labels == "one_hot":
        torch.testing.assert_close(episode.probabilities.sum(1), torch.ones(9).double())


def test_an_episode_that_is_not_there():
    task, model = task_and_model()
    with pytest.raises(ConfigError, match=r"episode: expected 0 to 39, .* got 40"):
        trace_episode(task, model, 40)
    with pytest.raises(ConfigError, match="got -1"):
        trace_episode(task, model, -1)


def test_a_slot_holds_the_image_of_the_step_that_wrote_most_since_its_erasure(episode):
    trace, stored = episode.trace, episode.stored()
    written = trace.write_weights.sum(1)
    for slot in range(8):
        erasures = [t for t in range(9) if slot in trace.slots[t]]
        for t in range(9):
            since = max((e for e in erasures if e <= t), default=None)
            if since is None:
                assert stored[t, slot] == -1
            else:
                assert stored[t, slot] == since + written[since : t + 1, slot].argmax()


def test_what_was_read_adds_up(episode):
    stored = episode.stored()
    for t, sources in enumerate(episode.sources()):
        weights = episode.trace.read_weights[t].sum(0) / 2
        for step, share, slots in sources:
            assert share == pytest.approx(weights[stored[t] == step].sum().item(), abs=1e-4)
            assert (stored[t, slots] == step).all()
        shares = [share for _, share, _ in sources]
        assert shares == sorted(shares, reverse=True)
        assert sum(shares) == pytest.approx(1, abs=1e-3) or len(shares) == inspection.MOST_SOURCES


# The rows of the heat maps


def test_rows_show_every_slot_once_or_the_extreme_of_several(episode):
    trace = episode.trace
    plain = SlotRows(trace)
    assert plain.slots == list(range(8))
    assert torch.equal(plain.weights(trace.usage), trace.usage)
    assert torch.equal(plain.memory(trace.memory), trace.memory)
    three = SlotRows(trace, most=3)
    assert (three.count, three.size, three.slots) == (3, 3, [0, 3, 6])
    assert three.row_of().tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    parts = trace.usage.split(3, -1)
    assert torch.equal(three.weights(trace.usage), torch.stack([p.amax(-1) for p in parts], -1))
    memory = three.memory(trace.memory)
    for part, row in zip(trace.memory.split(3, -2), memory.unbind(-2), strict=True):
        assert torch.equal(row.abs(), part.abs().amax(-2))
        assert (part == row.unsqueeze(-2)).any(-2).all()


def test_rows_in_order_of_first_write(episode):
    trace = episode.trace
    rows = SlotRows(trace, "first-write")
    assert sorted(rows.slots) == list(range(8))
    first = [next((t for t in range(9) if slot in trace.slots[t]), 9) for slot in rows.slots]
    assert first == sorted(first)
    assert torch.equal(rows.weights(trace.usage), trace.usage[:, rows.slots])


# The page


@pytest.mark.parametrize("slots", ["index", "first-write"])
def test_the_page_needs_nothing_else_and_holds_the_trace(episode, slots, tmp_path):
    write_page(episode, tmp_path / "page.html", slots)
    page = Page(tmp_path / "page.html")
    assert page.open == []
    assert "http:" not in page.text
    assert "https:" not in page.text
    assert not {"link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")
    data, trace = page.data, episode.trace
    assert (data["steps"], data["rows"]) == (9, 8)
    shown = [trace.usage, trace.write_weights.sum(1), trace.read_weights.sum(1)]
    shown += [trace.read_weights[:, head] for head in range(2)]
    assert len(data["maps"]) == len(shown)
    for drawn, values in zip(data["maps"], shown, strict=True):
        got = numbers(drawn["data"], 9, 8) / 255 * drawn["high"]
        half = drawn["high"] / 255 * 0.501
        torch.testing.assert_close(got, values[:, data["rowSlots"]], atol=half, rtol=0)
    bound = data["memory"]["bound"]
    got = numbers(data["memory"]["data"], 9, 8, 6) / 255 * 2 * bound - bound
    memory = trace.memory[:, data["rowSlots"]]
    torch.testing.assert_close(got, memory, atol=bound / 255 * 1.01, rtol=0)
    assert data["labels"] == list(episode.labels)
    assert data["right"] == episode.right
    assert data["writtenSlots"] == trace.slots.tolist()


def test_the_page_can_be_used_without_seeing_it_or_a_mouse(episode, tmp_path):
    write_page(episode, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    (slider,) = page.all("input")
    assert (slider["type"], slider["min"], slider["max"]) == ("range", "0", "8")
    assert slider["id"] in [label["for"] for label in page.all("label")]
    assert all(canvas["role"] == "img" and canvas["aria-label"] for canvas in page.all("canvas"))
    images = [image for image in page.all("img") if "src" in image]
    verdicts = ["right" if right else "wrong" for right in episode.right]
    for t, image in enumerate(images):
        said = f"Step {t}: label {episode.labels[t]}, predicted {episode.predictions[t]}"
        assert image["alt"] == f"{said}, {verdicts[t]}"
    assert len(images) == 9
    assert page.all("html")[0]["lang"] == "en"
    used = {attributes["aria-labelledby"] for attributes in page.all("section")[:2]}
    assert used <= {attributes.get("id") for _, attributes in page.tags}


def test_the_images_of_the_page_are_those_of_the_episode(episode, tmp_path):
    from PIL import Image

    write_page(episode, tmp_path / "page.html")
    sources = [each["src"] for each in Page(tmp_path / "page.html").all("img") if "src" in each]
    for source, image in zip(sources, episode.images, strict=True):
        (tmp_path / "image.png").write_bytes(base64.b64decode(source.partition(",")[2]))
        with Image.open(tmp_path / "image.png") as decoded:
            pixels = torch.from_numpy(np.array(decoded))
        assert torch.equal(pixels, (255 * (1 - image)).round().byte())


def test_a_title_cannot_break_the_page(episode, tmp_path):
    title = "</title><script>alert(1)</script> $$ & <b>"
    odd = dataclasses.replace(episode, title=title, names=["</script>", "1", "2"])
    write_page(odd, tmp_path / "page.html")
    page = Page(tmp_path / "page.html")
    assert page.open == []
    assert len(page.all("script")) == 2
    assert page.data["names"][0] == "</script>"


def test_without_pillow_the_page_says_so(episode, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"needs pillow: pip install 'mann_ext\[data\]'"):
        write_page(episode, tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_a_large_memory_makes_a_small_page(tmp_path):
    task, model = task_and_model(ways=5, length=120)
    model.memory.num_slots = 5000
    write_page(trace_episode(task, model, 0), tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 3e6
    data = Page(tmp_path / "page.html").data
    assert data["rows"] <= inspection.MOST_ROWS
    assert data["rows"] * data["rowSize"] >= 5000


# The figure


@pytest.mark.parametrize(("slots", "count"), [("index", 8), ("first-write", 8), ("index", 700)])
def test_the_figure_is_drawn(tmp_path, slots, count):
    from PIL import Image

    task, model = task_and_model()
    model.memory.num_slots = count
    path = tmp_path / "figure.png"
    assert figures.draw_episode(trace_episode(task, model, 0), path, step=4, slots=slots) == path
    with Image.open(path) as figure:
        assert len(figure.convert("RGB").getcolors(10**7)) > 100
    assert [file.name for file in tmp_path.iterdir()] == ["figure.png"]


def test_the_figure_has_labelled_axes_and_the_right_numbers(episode, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(figures, "save", lambda figure, path: seen.update(figure=figure))
    figures.draw_episode(episode, tmp_path / "none.png", step=4)
    axes = {each.get_title(): each for each in seen["figure"].axes if each.get_xlabel()}
    names = ["Usage", "Write weights, sum of heads", "Read weights, sum of heads"]
    names += ["Memory after step 4", "Read weights, head 0", "Read weights, head 1"]
    assert set(axes) == set(names)
    assert {each.get_ylabel() for each in axes.values()} == {"slot"}
    usage = torch.as_tensor(axes["Usage"].images[0].get_array().data)
    torch.testing.assert_close(usage, episode.trace.usage.T)
    memory = torch.as_tensor(axes["Memory after step 4"].images[0].get_array().data)
    torch.testing.assert_close(memory, episode.trace.memory[4])


def test_a_step_that_is_not_there(episode, tmp_path):
    with pytest.raises(ValueError, match="draw_episode: expected step from 0 to 8, got 9"):
        figures.draw_episode(episode, tmp_path / "none.png", step=9)


# The command


def run(*words: object) -> int:
    try:
        return cli.main([str(word) for word in words])
    except SystemExit as stop:
        return int(stop.code or 0)


def test_a_run_and_a_checkpoint_are_inspected(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_here(tiny(tmp_path / "run", minibatches=3))
    assert run("inspect", "run", "--episode", 2) == 0
    written = {"episode-2.html", "episode-2.png"}
    assert written <= {path.name for path in Path("run").iterdir()}
    assert "tiny after 3 minibatches, held-out episode 2" in Page(Path("run/episode-2.html")).text
    out = ["--out", "there.html", "--slots", "first-write", "--num-slots", 20]
    assert run("inspect", "run/checkpoints/step-000000003", *out) == 0
    assert Page(Path("there.html")).data["rows"] == 20
    assert Path("there.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    for words, message in [
        (["run", "--episode", "40"], "episode: expected 0 to 39"),
        (["run", "--num-slots", "0"], "num_slots: expected at least 1"),
        (["run", "--out", "not/there.html"], "No such file"),
        (["run", "--out", "there.png"], "out: expected the name of a page, FILE.html"),
        (["nowhere"], "no checkpoint in nowhere; expected a run's folder, a checkpoint or"),
        ([], "inspect: expected a run's folder"),
    ]:
        assert run("inspect", *words) == 2
        assert message in capsys.readouterr().err


def test_a_model_without_memory_is_refused(tmp_path, capsys):
    config = tiny(tmp_path, minibatches=1)
    train_here(dataclasses.replace(config, model=dataclasses.replace(config.model, kind="lstm")))
    capsys.readouterr()
    assert run("inspect", tmp_path) == 2
    assert "without an LRUA memory (LSTM); expected a MANN" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


def test_the_pretrained_model_is_inspected(tmp_path, monkeypatch):
    if not (Path(os.environ.get("MANN_EXT_DATA", "")) / "omniglot.npz").is_file():
        pytest.skip("no omniglot.npz in MANN_EXT_DATA")
    monkeypatch.chdir(tmp_path)
    assert run("inspect", "omniglot-5way", "--episode", 1) == 0
    page = Page(Path("omniglot-5way-episode-1.html"))
    assert (page.data["steps"], page.data["rows"]) == (50, 128)
    assert sum(page.data["right"]) > 35
