"""``mann-ext reproduce``: trains once, measures, compares, and keeps the README true."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch

from mann_ext import cli, evaluation, reporting, reproduce, training
from mann_ext.experiments import REPRODUCTIONS, ablation, classification, curriculum, persistent
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.nearest_neighbours import predictions
from mann_ext.experiments.reproduction import ReproduceOptions, Reproduction, Run
from tests.test_cli import run as command
from tests.tiny_training import TINY, kill, start, wait_for_checkpoint

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def tiny_reproduction(name: str) -> Reproduction:
    """One of the registry on 24 synthetic classes, its models tiny and trained for seconds."""
    entry = REPRODUCTIONS[name]
    runs = []
    for run in entry.runs:
        config: Any = run.config
        episodes = replace(config.episodes, synthetic_classes=24, batch_size=4)
        labels = episodes.labels
        episodes = replace(episodes, ways=3, length=9 if labels == "one_hot" else None)
        if episodes.grow_every:
            episodes = replace(episodes, ways=2, grow_every=40, ways_most=4)
        budget = replace(TINY.run, minibatches=30, eval_every=10, eval_episodes=4)
        config = replace(config, episodes=episodes, run=budget)
        if hasattr(config, "model"):
            sizes = {"hidden_size": 12, "num_slots": 8, "slot_size": 6}
            config = replace(config, model=replace(config.model, **sizes))
        runs.append(replace(run, config=config))
    return replace(entry, runs=tuple(runs))


def options(folder: Path, **changes: Any) -> ReproduceOptions:
    return ReproduceOptions(
        **{"out": folder, "source": "synthetic", "threads": 1, "episodes": 8, **changes}
    )


def json_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*-seed*.json")}


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("was called")


def test_the_tables_are_trained_once_measured_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tiny_reproduction("santoro-table1")
    wanted = ("mann", "lstm", "feedforward")
    assert reproduce.reproduce(entry, options(tmp_path, only=wanted, seeds=(0, 1))) is None
    found = json_of(tmp_path)
    assert sorted(found) == sorted(f"{name}-seed{seed}" for name in wanted for seed in (0, 1))
    for name, values in found.items():
        assert values["minibatches"] == 30
        assert values["seed"] == int(name[-1])
        assert values["moved"]["accuracy"] != values["accuracy"]
        assert values["config"]["run"]["run_dir"] is None, "no folder of the machine"
        curve = values["curve"]
        log = reporting.read_metrics(tmp_path / name)
        measured = [line for line in log if line["kind"] == "eval"]
        assert curve["episodes"] == [line["episodes"] for line in measured]
        assert curve["accuracy"]["2"] == [round(line["accuracy"]["2"], 4) for line in measured]
        for key in ("command", "version", "machine", "training_seconds", "episodes"):
            assert key in values
    out = capsys.readouterr().out
    assert "over 2 seeds" in out
    page = (tmp_path / "santoro-table1.md").read_text()
    assert "![" in page
    assert "3 classes, one-hot labels" in page
    for picture in ("santoro-table1.png", "santoro-table1-learning.png"):
        assert f"({picture})" in page
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")

    # All of it is there, so the second call neither trains nor measures.
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", never)
        patch.setattr(training, "load_run", never)
        reproduce.reproduce(entry, options(tmp_path, only=wanted, seeds=(0, 1)))
    assert json_of(tmp_path) == found

    # A lost file is measured again, with the same outcome, from the run that is kept.
    (tmp_path / "mann-seed0.json").unlink()
    reproduce.reproduce(entry, options(tmp_path, only=("mann",)))
    assert json_of(tmp_path)["mann-seed0"]["accuracy"] == found["mann-seed0"]["accuracy"]
    assert json_of(tmp_path)["mann-seed0"]["minibatches"] == 30

    # A larger budget goes on with the run.
    reproduce.reproduce(entry, options(tmp_path, only=("mann",), minibatches=34))
    assert json_of(tmp_path)["mann-seed0"]["minibatches"] == 34


def test_a_long_learning_curve_is_thinned_to_its_end(tmp_path: Path) -> None:
    lines = [
        {"kind": kind, "episodes": 16 * n, "accuracy": {"1": 0.2, "2": n / 1000}}
        for n in range(1, 101)
        for kind in ("train", "eval")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    curve = classification.learning_curve(tmp_path)
    assert curve["episodes"][-3:] == [16 * 94, 16 * 97, 16 * 100]
    assert len(curve["episodes"]) <= classification.CURVE_POINTS
    assert curve["accuracy"]["2"][-1] == 0.1
    assert set(curve["accuracy"]) == {"1", "2"}, "an episode of so few steps shows no more"


def _reproduce_until_stopped(folder: Path) -> None:
    entry = tiny_reproduction("santoro-table1")
    number = reproduce.reproduce(entry, options(folder, only=("mann",), minibatches=10**6))
    sys.exit(128 + (number or 0))


def test_an_interrupted_run_is_resumed_and_has_no_result_until_it_is_complete(
    tmp_path: Path,
) -> None:
    process = start(_reproduce_until_stopped, tmp_path)
    wait_for_checkpoint(tmp_path / "mann-seed0", None, process)
    kill(process, signal.SIGINT)
    assert process.exitcode == 130
    assert not json_of(tmp_path)
    newest = training.find_checkpoint(tmp_path / "mann-seed0")
    stopped_at = int(newest.name.removeprefix("step-"))
    entry = tiny_reproduction("santoro-table1")
    reproduce.reproduce(entry, options(tmp_path, only=("mann",), minibatches=stopped_at + 3))
    assert json_of(tmp_path)["mann-seed0"]["minibatches"] == stopped_at + 3


def test_table_2_has_neighbours_and_strings(tmp_path: Path) -> None:
    entry = tiny_reproduction("santoro-table2")
    wanted = ("knn-pixels-5", "knn-deep-15", "mann-feedforward-15", "mann-5")
    reproduce.reproduce(entry, options(tmp_path, only=wanted))
    found = json_of(tmp_path)
    for name in wanted[:2]:
        assert found[f"{name}-seed0"]["accuracy"]["1"] == 0.0, "nothing can be known before"
        assert found[f"{name}-seed0"]["accuracy"]["3"] > 0.0
    assert found["knn-deep-15-seed0"]["autoencoder_minibatches"] == 30
    assert found["mann-5-seed0"]["config"]["episodes"]["labels"] == "string"


def test_neighbours_see_only_what_came_before() -> None:
    points = np.array([[0.0, 0.0], [1.0, 0.0], [0.2, 0.0], [0.9, 0.0], [5.0, 5.0], [5.0, 5.1]])
    labels = np.array([7, 3, 7, 3, 9, 9])
    # 1: only point 0. 2: point 0. 3: point 1. 4, a new class: point 3, the nearest of all so far.
    # 5: point 4, stored after its own prediction.
    assert predictions(points, labels).tolist() == [-1, 7, 7, 3, 3, 9]


def test_episodes_in_a_row_with_a_memory_that_is_kept(tmp_path: Path) -> None:
    entry = tiny_reproduction("santoro-persistent")
    reproduce.reproduce(entry, options(tmp_path, only=("10-classes",), episodes=10))
    values = json_of(tmp_path)["10-classes-seed0"]
    assert values["episodes"] == 12, "whole minibatches of 4"
    carried = values["carried"]
    firsts = [episodes[0]["accuracy"] for episodes in carried.values()]
    assert firsts[0] == firsts[1] == firsts[2], "the first episode has nothing to carry"
    wiped = [episode["accuracy"] for episode in carried["nothing"]]
    kept = [episode["accuracy"] for episode in carried["memory"]]
    assert len(wiped) == persistent.IN_A_ROW
    assert wiped[1:] != kept[1:]
    assert "10 classes in 9 steps" in (tmp_path / "santoro-persistent.md").read_text()


def test_carrying_everything_is_one_long_sequence() -> None:
    """Against the accuracy of one call on the concatenated episodes."""
    from mann_ext.experiments.few_shot import FewShot, count
    from mann_ext.models import MANN

    config = replace(TINY, episodes=replace(TINY.episodes, ways=5, length=20))
    task = FewShot(config, torch.device("cpu"))
    model = MANN.from_pretrained(persistent.PRETRAINED)
    batches = list(task.held_out_episodes(4 * persistent.IN_A_ROW))
    with torch.inference_mode():
        whole = model(torch.cat([batch.inputs for batch in batches]))[0].split(20)
    found = persistent.in_a_row(task, model, "everything", 4)
    for logits, batch, accuracy in zip(whole, batches, found, strict=True):
        assert torch.equal(count(logits, batch)[:, 0].double(), accuracy.correct)


def test_the_curriculum_is_tested_on_more_classes_and_slots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curriculum, "TEST_WAYS", (4, 6))
    entry = tiny_reproduction("santoro-curriculum")
    reproduce.reproduce(entry, options(tmp_path))
    values = json_of(tmp_path)["mann-seed0"]
    sizes = [(test["ways"], test["num_slots"]) for test in values["tests"]]
    assert sizes == [(4, 8), (4, 32), (6, 8), (6, 32)]
    assert values["config"]["episodes"]["ways_most"] == 4
    assert "6 classes, 32 slots" in (tmp_path / "santoro-curriculum.md").read_text()


def test_the_ablation_has_the_mean_and_the_range_over_its_seeds(tmp_path: Path) -> None:
    entry = tiny_reproduction("santoro-ablation")
    wanted = ("base", "read-feedback", "rmsprop")
    page = tmp_path / "docs" / "ablation.md"
    page.parent.mkdir()
    reproduce.reproduce(entry, options(tmp_path, only=wanted, minibatches=4, page=page))
    assert len(json_of(tmp_path)) == 9
    assert page.with_suffix(".png").is_file()
    (table,) = ablation.tables(entry, reproduce.stored(entry, tmp_path))
    assert [row[0] for row in table.rows] == [run.label for run in entry.runs if run.name in wanted]
    values = [json_of(tmp_path)[f"base-seed{seed}"]["accuracy"]["2"] for seed in range(3)]
    low, mean, high = min(values), sum(values) / 3, max(values)
    assert table.rows[0][1] == f"{100 * mean:.1f} ({100 * low:.1f} to {100 * high:.1f})"
    assert f"| {table.rows[0][0]} | {table.rows[0][1]} |" in page.read_text()
    assert page.read_text().count(entry.findings) == 1
    one = {"base": reproduce.stored(entry, tmp_path)["base"][:1]}
    assert ablation.tables(entry, one)[0].rows[0][1] == f"{100 * values[0]:.1f}"


def test_every_change_of_the_ablation_changes_one_thing() -> None:
    from mann_ext.experiments.config import differences

    base, *others = REPRODUCTIONS["santoro-ablation"].runs
    for run in others:
        changed = {line.split(":")[0] for line in differences(base.config, run.config)}
        together = {"read_strength", "learn_strength"}, {"optimiser", "learning_rate", "schedule"}
        assert len(changed) == 1 or any(changed <= group for group in together), run.name


def test_intervals_over_seeds_are_those_of_student() -> None:
    results = [
        {"accuracy": {"2": value}, "half_width_95": {"2": 0.001}} for value in (0.90, 0.93, 0.96)
    ]
    means, widths = evaluation.across_seeds(results)
    assert means["2"] == pytest.approx(0.93)
    low, high = scipy.stats.t.interval(0.95, 2, 0.93, 0.03 / 3**0.5)
    assert widths["2"] == pytest.approx((high - low) / 2, rel=1e-4)
    assert evaluation.across_seeds(results[:1]) == ({"2": 0.90}, {"2": 0.001})
    for freedom in range(1, 40):
        expected = scipy.stats.t.ppf(0.975, freedom)
        assert evaluation.t_quantile(freedom) == pytest.approx(expected, abs=1e-3)


def test_every_reproduction_is_listed_and_shown_from_what_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["reproduce", "--list"]) == 0
    out = capsys.readouterr().out
    for entry in REPRODUCTIONS.values():
        assert f"{entry.name}: {entry.description}" in out
        assert len({run.name for run in entry.runs}) == len(entry.runs)
        kept = reproduce.stored(entry, reproduce.COMMITTED / entry.name)
        words = ["reproduce", entry.name, "--from-results", "--out", str(tmp_path / entry.name)]
        assert cli.main(words) == (0 if kept else 2)
        assert (tmp_path / entry.name / f"{entry.name}.md").is_file() == bool(kept)


LIST = """
import sys
from mann_ext import cli
cli.main(["reproduce", "--list"])
heavy = {"tyro", "rich", "matplotlib", "sklearn", "mann_ext.training", "mann_ext.data"}
assert not heavy & set(sys.modules)
"""


def test_listing_imports_nothing_heavy() -> None:
    subprocess.run([sys.executable, "-c", LIST], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["santoro-tabel1"],
            "unknown reproduction 'santoro-tabel1'; expected one of santoro-table1",
        ),
        (["santoro-table1", "--only", "mnan"], "has no row 'mnan'; expected some of mann, demo"),
        (["santoro-table1", "--seeds", "1", "1"], "seeds: expected different numbers"),
        (["santoro-table1", "--episodes", "1"], "episodes: expected at least 2"),
        (["santoro-table1", "--minutes", "-1"], "minutes: expected at least 0, got -1"),
        (["--readme"], "expected one Markdown file"),
        (["--readme", "no-such-file.md"], "no-such-file.md: No such file"),
    ],
)
def test_mistakes_get_one_clear_message(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("reproduce", *words) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert not list(tmp_path.iterdir()), "nothing is left behind"


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    (tmp_path / "mann-seed0.json").write_text("{")
    with pytest.raises(ConfigError, match=r"mann-seed0\.json is damaged"):
        reproduce.stored(REPRODUCTIONS["santoro-table1"], tmp_path)


def test_the_readme_shows_what_the_kept_results_say(tmp_path: Path) -> None:
    text = (REPOSITORY / "README.md").read_text()
    stale = tmp_path / "README.md"
    for name, block in reproduce.readme_blocks().items():
        before, shown, after = reproduce.split_readme(text, name)
        assert shown.strip() == block, "mann-ext reproduce --readme README.md"

        start, end = reproduce.readme_marks(name)
        stale.write_text(f"{before}{start}\nold\n{end}{after}")
        reproduce.write_readme(stale)
        assert stale.read_text() == text
        stale.write_text(before + after)
        with pytest.raises(ConfigError, match=f"expected {start} and then {end}"):
            reproduce.write_readme(stale)


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_kept_pages_show_what_the_kept_results_say(name: str) -> None:
    entry = REPRODUCTIONS[name]
    results = reproduce.stored(entry, reproduce.COMMITTED / name)
    pages = [reproduce.COMMITTED / name / f"{name}.md"]
    pages += [REPOSITORY / "docs" / f"{name.removeprefix('santoro-')}.md"]
    for page in filter(Path.is_file, pages):
        tables = entry.experiment().tables(entry, results)
        pictures = [
            reproduce.picture(page, name) for name in entry.experiment().figures(entry, results)
        ]
        expected = reproduce.markdown(entry, results, tables, [path.name for path in pictures])
        assert page.read_text() == expected, f"mann-ext reproduce {entry.name} --from-results"
        assert all(map(Path.is_file, pictures))


def test_a_row_of_another_task_needs_only_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other experiments rely on: the module is the whole interface."""
    from types import ModuleType

    from mann_ext.reporting import Table

    module = ModuleType("tests.other_experiment")
    module.measure = lambda run, config, trained, episodes: {  # type: ignore[attr-defined]
        "nll": 1.25, "data": "numbers", "episodes": episodes, **evaluation.provenance(config)
    }  # fmt: skip
    module.tables = lambda entry, results: [  # type: ignore[attr-defined]
        Table("NLL", ("", "nll"), tuple((n, str(r[0]["nll"])) for n, r in results.items()))
    ]
    module.figures = lambda entry, results: {}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = Run("one", "One", TINY, None, 1)
    entry = Reproduction("other", "another task", "Nothing.", (row,), module.__name__)
    reproduce.reproduce(entry, options(tmp_path))
    assert json_of(tmp_path)["one-seed0"]["nll"] == 1.25
    assert "| one | 1.25 |" in (tmp_path / "other.md").read_text()
