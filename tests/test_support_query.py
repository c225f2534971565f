"""Tasks of support images and queries: training, evaluation, and MetaNet's reproductions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch

from mann_ext import data, reproduce, training
from mann_ext.data import OneShotRuns, Tasks
from mann_ext.experiments import REPRODUCTIONS, metanet_continual, metanet_mnist, metanet_transfer
from mann_ext.experiments.config import ConfigError
from mann_ext.experiments.reproduction import ReproduceOptions, Reproduction
from mann_ext.experiments.support_query import (
    LEARNERS,
    PRESETS,
    LearnerConfig,
    SupportQueryConfig,
    TasksConfig,
    paper_name,
    with_model,
)
from mann_ext.experiments.support_query_task import SupportQuery, for_ways, summary
from mann_ext.models import MetaNet
from mann_ext.models.metric import pair_loss
from mann_ext.training import train
from tests.test_cli import run as command
from tests.test_data_tasks import write_mini_imagenet
from tests.tiny_training import TINY, assert_same_state, metrics_of, state_of

CPU = torch.device("cpu")

TINY_TASKS = SupportQueryConfig(
    model=LearnerConfig(filters=2),
    episodes=TasksConfig(source="synthetic", synthetic_classes=30, ways=3, queries=2, batch_size=2),
    optimiser=TINY.optimiser,
    run=replace(TINY.run, minibatches=6, log_every=2, eval_every=4, eval_episodes=4),
)


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def learner(name: str, **run: Any) -> SupportQueryConfig:
    """The tiny tasks for a learner of LEARNERS."""
    config = with_model(TINY_TASKS, *LEARNERS[name][1:])
    return replace(config, run=replace(config.run, **run))


TRAINED = [name for name in LEARNERS if name != "knn"]


@pytest.mark.parametrize("name", TRAINED)
def test_every_learner_is_trained_and_resumed_bit_for_bit(tmp_path: Path, name: str) -> None:
    schedule = replace(TINY_TASKS.optimiser, schedule="constant")
    for folder, parts in (("whole", (6,)), ("parts", (1, 5, 6))):
        for minibatches in parts:
            config = learner(name, minibatches=minibatches, run_dir=tmp_path / folder)
            outcome = train(replace(config, optimiser=schedule), name, resume=True)
    assert_same_state(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert outcome.results is not None
    stored = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert stored["accuracy"] == outcome.results["accuracy"]
    assert list(stored["accuracy"]) == ["3"]
    assert stored["episodes"] == 40
    assert stored["training_episodes"] == 12
    kinds = [record["kind"] for record in metrics_of(tmp_path / "whole")]
    assert kinds == ["train", "train", "eval", "train"]


def test_the_command_line_trains_evaluates_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = (
        "--source synthetic --synthetic-classes 40 --ways 3 --queries 2 --filters 2 --threads 1 "
        "--log-every 2 --eval-every 4 --eval-episodes 4 --final-episodes 8 --no-tensorboard"
    ).split()
    folder = tmp_path / "run"
    words = ("metanet-5way", *small, "--minibatches", 4, "--run-dir", folder)
    assert command("train", *words) == 0
    out = capsys.readouterr().out
    assert "3 classes, 1 shot: MetaNet after 4 minibatches" in out
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert command("eval", folder, "--episodes", 8, "--json", tmp_path / "same.json") == 0
    stored = json.loads((folder / "results.json").read_text())
    again = json.loads((tmp_path / "same.json").read_text())
    assert again["accuracy"] == stored["accuracy"]
    others = ("--test-ways", 5, "--shots", 2, "--queries", 1)
    assert command("eval", folder, *others, "--episodes", 8, "--json", tmp_path / "5.json") == 0
    assert list(json.loads((tmp_path / "5.json").read_text())["accuracy"]) == ["5"]
    assert (
        command("train", "metanet-5way", "--resume", "--run-dir", folder, "--minibatches", 6) == 0
    )
    assert state_of(folder)["progress"]["step"] == 6


def test_what_santoro_runs_have_not_got_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(learner("protonet", run_dir=tmp_path, final_episodes=0), "protonet-5way")
    assert command("eval", tmp_path, "--num-slots", 4) == 2
    assert "support-query, which has no such option" in capsys.readouterr().err
    task = SupportQuery(TINY_TASKS, CPU)
    with pytest.raises(ConfigError, match="9-way tasks need as many classes, got 8"):
        list(task.held_out_tasks(1, ways=9))
    for field in ("ways", "shots", "queries", "batch_size", "test_ways", "train_queries"):
        values: dict[str, Any] = {field: 0}
        with pytest.raises(ConfigError, match=f"{field}: expected at least 1, got 0"):
            TasksConfig(**values)
    with pytest.raises(ConfigError, match="same_alphabet: expected 0 to 1, got 2"):
        TasksConfig(same_alphabet=2)
    with pytest.raises(ConfigError, match="miniImageNet has no alphabets"):
        TasksConfig(source="miniimagenet", same_alphabet=1)
    with pytest.raises(ConfigError, match="filters: expected at least 1, got 0"):
        LearnerConfig(filters=0)
    with pytest.raises(ConfigError, match="task_examples: expected at least 1, got 0"):
        LearnerConfig(task_examples=0)
    with pytest.raises(ConfigError, match="PixelNeighbours has no parameters to train"):
        train(learner("knn", run_dir=tmp_path / "knn"))


def test_every_preset_describes_itself() -> None:
    for name, (config, description) in PRESETS.items():
        number = name.rpartition("-")[2].removesuffix("way")
        if number.isdecimal():
            assert config.episodes.ways == int(number)
            assert f"{number} classes" in description
        assert paper_name(config.model) in description
        assert ("standard" in name) == (config.episodes.split == "background")
        assert config.optimiser.clip_norm == 10
        assert config.optimiser.learning_rate == 1e-3
        assert (config.episodes.batch_size, config.episodes.shots) == (1, 1)


def test_the_loss_is_the_mean_over_tasks_and_their_queries() -> None:
    task = SupportQuery(learner("siamese"), CPU)
    model = task.model().eval()
    episodes = task.training_episodes.sample()
    loss, tally = task.loss(model, episodes)
    losses, right = [], 0
    for support, support_labels, queries, labels in zip(*episodes, strict=True):
        logits = model(support, support_labels, queries)
        losses.append(pair_loss(logits, labels))
        right += int((logits.argmax(-1) == labels).sum())
    torch.testing.assert_close(loss, sum(losses) / len(losses))
    assert tally.tolist() == [[right], [2 * 3 * 2]]


def test_held_out_tasks_are_the_same_each_time_and_of_other_classes_than_training() -> None:
    task = SupportQuery(TINY_TASKS, CPU)
    first, again = ([part.support for part in task.held_out_tasks(3)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    known = {image.numpy().tobytes() for image in task.training_episodes._images}
    assert len(known) == 22 * 4 * 20, "classes, quarter turns, drawings"
    for batch in task.held_out_tasks(20):
        for image in batch.support[0]:
            assert (image * 255).round().byte().numpy().tobytes() not in known


def test_training_may_use_fewer_queries_and_examples() -> None:
    config = replace(
        TINY_TASKS,
        model=replace(TINY_TASKS.model, task_examples=1),
        episodes=replace(TINY_TASKS.episodes, train_queries=1),
    )
    task = SupportQuery(config, CPU)
    assert task.training_episodes.sample().queries.shape[:2] == (2, 3)
    assert next(iter(task.held_out_tasks(1))).queries.shape[:2] == (1, 6)
    model = task.model()
    assert isinstance(model, MetaNet)
    assert model.task_examples == 1


def test_training_tasks_may_keep_to_one_alphabet(monkeypatch: pytest.MonkeyPatch) -> None:
    glyphs = data.synthetic_characters(12)
    names = [f"{alphabet}/{i}" for alphabet in ("Zulu", "Alpha") for i in range(6)]
    glyphs = replace(glyphs, names=tuple(names))
    monkeypatch.setattr("mann_ext.experiments.support_query_task.load_data", lambda tasks: glyphs)
    known, _ = glyphs.split("background")
    alphabets = [name.split("/")[0] for name in known.names]
    config = replace(TINY_TASKS.episodes, split="background", same_alphabet=1.0, ways=2)
    sampler = SupportQuery(replace(TINY_TASKS, episodes=config), CPU).training_episodes
    turned, count = [], len(alphabets)
    for _ in range(50):
        for chosen in sampler._choose(1, 2).tolist():
            assert len({(alphabets[i % count], i // count) for i in chosen}) == 1
            turned.append(chosen[0] // count)
    assert set(turned) == {0, 1, 2, 3}


def test_intervals_are_over_tasks() -> None:
    shares = torch.tensor([0.5, 1.0, 0.75, 0.75, 0.9], dtype=torch.float64)
    found = summary({"5": shares, "one": shares[:1]})
    assert found["accuracy"] == {"5": pytest.approx(0.78), "one": 0.5}
    low, high = scipy.stats.t.interval(0.95, 4, 0.78, scipy.stats.sem(shares.numpy()))
    assert found["half_width_95"] == {"5": pytest.approx((high - low) / 2, rel=1e-4)}


def test_pixel_neighbours_find_a_copy_of_the_query() -> None:
    model = SupportQuery(learner("knn"), CPU).model()
    support = torch.rand(6, 1, 28, 28)
    labels = torch.tensor([2, 0, 1, 1, 0, 2])
    order = torch.randperm(6)
    logits = model(support, labels, support[order] + 0.01)
    assert torch.equal(logits.argmax(-1), labels[order])


def test_only_a_metanet_is_changed_for_other_numbers_of_classes() -> None:
    model = MetaNet(3, filters=2)
    assert for_ways(model, 3) is model
    assert for_ways(model, 7).ways == 7
    net = SupportQuery(learner("protonet"), CPU).model()
    assert for_ways(net, 7) is net


# mann-ext reproduce


def tiny_reproduction(name: str) -> Reproduction:
    """One of the registry on synthetic characters, its models tiny and trained for seconds."""
    entry = REPRODUCTIONS[name]
    runs = []
    for run in entry.runs:
        tasks = replace(run.config.episodes, synthetic_classes=60, queries=2, train_queries=2)
        config = replace(
            run.config,
            episodes=tasks,
            model=replace(run.config.model, filters=2),
            run=replace(TINY_TASKS.run, minibatches=3, eval_every=0),
        )
        runs.append(replace(run, config=config))
    return replace(entry, runs=tuple(runs))


def reproduced(folder: Path, name: str, **changes: Any) -> dict[str, dict[str, Any]]:
    """The JSON by run after reproducing something in a folder."""
    values = {"out": folder, "source": "synthetic", "threads": 1, "episodes": 4, **changes}
    assert reproduce.reproduce(tiny_reproduction(name), ReproduceOptions(**values)) is None
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    return {
        path.stem.removesuffix("-seed0"): json.loads(path.read_text())
        for path in folder.glob("*-seed0.json")
    }


def test_the_omniglot_table_has_every_learner_beside_the_papers(tmp_path: Path) -> None:
    wanted = ("metanet-5", "metanet-minus-5", "metanet-plus-5", "siamese-5", "matching-5", "knn-5")
    found = reproduced(tmp_path, "metanet-omniglot", only=(*wanted, "protonet-10", "protonet-5"))
    assert sorted(found) == sorted([*wanted, "protonet-10", "protonet-5"])
    for name, values in found.items():
        assert values["episodes"] == 4
        assert list(values["accuracy"]) == [name.rpartition("-")[2]]
        assert list(values["half_width_95"]) == list(values["accuracy"])
        assert ("minibatches" in values) == (name != "knn-5")
    page = (tmp_path / "metanet-omniglot.md").read_text()
    assert "| MetaNet, paper | 98.95 | 98.67 | 97.11 | 97.00 |  |" in page
    assert "| pixel kNN, paper | 41.70 |  |  | 26.70 |  |" in page
    own = [f"{100 * found[f'protonet-{n}']['accuracy'][n]:.2f}" for n in ("5", "10")]
    assert f"| prototypical network, ours | {own[0]} | {own[1]} |  |  |" in page


def test_lakes_runs_are_measured_where_20_ways_of_the_evaluation_set_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glyphs = data.synthetic_characters(400, 2, seed=5).images.unflatten(0, (20, 20))
    orders = torch.stack([torch.randperm(20) for _ in range(20)])
    asked = glyphs[:, :, 0].gather(1, orders[:, :, None, None].expand(-1, -1, 105, 105))
    runs = OneShotRuns(glyphs[:, :, 0], asked, orders)  # each query is a support image
    monkeypatch.setattr(data, "one_shot_runs", lambda root: runs)
    entry = tiny_reproduction("metanet-standard-split")
    run = {run.name: run for run in entry.runs}["knn-20"]
    config = replace(run.config, episodes=replace(run.config.episodes, source="auto"))
    monkeypatch.setattr(
        "mann_ext.experiments.support_query_task.load_data",
        lambda tasks: data.synthetic_characters(60),
    )
    values = entry.experiment().measure(run, config, None, 4)
    assert values["one_shot_runs"]["accuracy"] == {"runs": 1.0}
    results = {"knn-20": [values]}
    _, table = entry.experiment().tables(entry, results)
    assert ("pixel kNN", "78.3", "0.0", "±0.0") in table.rows
    assert ("human", "4.5", "", "") in table.rows
    # Without them, there is no such table.
    found = reproduced(tmp_path, "metanet-standard-split", only=("knn-20", "protonet-5"))
    assert "one_shot_runs" not in found["knn-20"]
    assert (
        "20 runs of 20-way one-shot classification, 400"
        not in (tmp_path / "metanet-standard-split.md").read_text()
    )


def test_reproductions_share_training_runs_and_test_on_other_numbers_of_classes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metanet_transfer, "TEST_WAYS", (5, 7))
    monkeypatch.setattr(metanet_transfer, "MOST_QUERIES", 7)
    shared = {"only": ("metanet-5", "protonet-5"), "runs": tmp_path / "runs"}
    first = reproduced(tmp_path / "omniglot", "metanet-omniglot", **shared)
    found = reproduced(tmp_path / "transfer", "metanet-transfer", **shared)
    for name, values in found.items():
        assert values["training_seconds"] == first[name]["training_seconds"], "not trained again"
        assert list(values["accuracy"]) == ["5", "7"]
    assert not list((tmp_path / "transfer").glob("*-seed0"))
    page = (tmp_path / "transfer" / "metanet-transfer.md").read_text()
    assert "| MetaNet, trained 5-way, paper | 98.95 |  | 96.40 | 93.60 | 93.07 |  |" in page


def test_tasks_of_more_classes_are_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[int | None, tuple[int, int | None]] = {}
    held_out_tasks = SupportQuery.held_out_tasks

    def recorded(
        self: SupportQuery, tasks: int, ways: int | None = None, queries: int | None = None
    ) -> Any:
        asked[ways] = (tasks, queries)
        return held_out_tasks(self, 1, 5, 1)

    monkeypatch.setattr(SupportQuery, "held_out_tasks", recorded)
    run = next(run for run in REPRODUCTIONS["metanet-transfer"].runs if run.name == "protonet-5")
    config = replace(run.config, episodes=replace(run.config.episodes, source="synthetic"))
    metanet_transfer.measure(run, config, None, 300)
    assert asked == {5: (300, 10), 10: (150, 10), 15: (100, 10), 20: (75, 10), 100: (75, 2)}


def test_a_row_says_how_long_each_of_its_models_was_trained() -> None:
    entry = REPRODUCTIONS["metanet-omniglot"]
    results = {
        f"protonet-{ways}": [
            {
                "accuracy": {ways: 0.5}, "half_width_95": {ways: 0.1}, "minibatches": steps,
                "training_seconds": 60.0, "episodes": 10, "seed": 0,
            }
        ]
        for ways, steps in (("5", 300), ("20", 100))
    }  # fmt: skip
    (table,) = entry.experiment().tables(entry, results)
    place = [row[0] for row in table.rows].index("prototypical network, ours")
    efforts = "5-way: 300 minibatches, 1.0 min; 20-way: 100 minibatches, 1.0 min"
    assert table.rows[place][-1] == efforts
    assert table.rows[place + 1][-1] == "over 10 episodes, seed 0"


def test_base_learners_that_were_never_trained(tmp_path: Path) -> None:
    found = reproduced(tmp_path, "metanet-fixed-base", only=("metanet-5",))
    accuracy = found["metanet-5"]["accuracy"]
    assert list(accuracy) == ["as trained", "32 filters", "128 filters"]
    page = (tmp_path / "metanet-fixed-base.md").read_text()
    assert "|  | as trained | 32 filters | 128 filters | measured after |" in page


def test_digits_after_characters(tmp_path: Path) -> None:
    found = reproduced(tmp_path, "metanet-mnist", only=("metanet-10", "matching-10", "knn-10"))
    assert all(list(values["accuracy"]) == ["10"] for values in found.values())
    page = (tmp_path / "metanet-mnist.md").read_text()
    assert "| MetaNet-, paper | 71.60 |" in page
    assert found["knn-10"]["accuracy"]["10"] > 0.2, "chance is 0.1"


def test_the_digits_are_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MNIST", lambda root, train: (root, train))
    found = metanet_mnist.digits(TasksConfig(data_root=tmp_path), train=False)
    assert found == (tmp_path, False)


def test_to_mnist_and_back_changes_only_the_meta_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metanet_continual, "EVERY", 2)
    monkeypatch.setattr(metanet_continual, "POINTS", 2)
    monkeypatch.setattr(metanet_continual, "MNIST_TASKS", 2)
    found = reproduced(tmp_path, "metanet-continual")["metanet-5"]
    assert [point["tasks"] for point in found["points"]] == [0, 2, 4]
    assert found["points"][0]["change"] == 0
    for point in found["points"]:
        change = point["omniglot"] - found["points"][0]["omniglot"]
        assert point["change"] == pytest.approx(change)
    assert "zero crossing" in (tmp_path / "metanet-continual.md").read_text()

    # What is measured on Omniglot: its own slow weights, and meta weights that moved.
    task = SupportQuery(TINY_TASKS, CPU)
    model = task.model()
    assert isinstance(model, MetaNet)
    slow = [weight.clone() for weight in model.slow_parameters()]
    meta = [weight.clone() for weight in model.meta_parameters()]
    seen: list[tuple[bool, bool]] = []

    def accuracies(model: MetaNet, batches: Any) -> torch.Tensor:
        pairs = ((slow, model.slow_parameters()), (meta, model.meta_parameters()))
        before, after = (
            all(torch.equal(a, b) for a, b in zip(old, new, strict=True)) for old, new in pairs
        )
        seen.append((before, after))
        return torch.rand(len(list(batches)), dtype=torch.float64)

    monkeypatch.setattr(task, "accuracies", accuracies)
    metanet_continual.back_and_forth(task, model, 3)
    omniglot, mnist = seen[0::2], seen[1::2]
    assert omniglot == [(True, True), (True, False), (True, False)]
    assert mnist == [(False, True), (False, False), (False, False)]


def test_where_a_curve_crosses_zero() -> None:
    crossing = metanet_continual.zero_crossing
    assert crossing([(0, 0.0), (400, 0.01), (800, -0.03)]) == pytest.approx(500)
    assert crossing([(0, 0.0), (400, 0.01), (800, 0.0)]) == 800
    assert crossing([(0, 0.0), (400, -0.01), (800, -0.03)]) is None
    assert crossing([(0, 0.0), (400, -0.01), (800, 0.01), (1200, -0.01)]) == pytest.approx(1000)


def test_mini_imagenet_is_run_where_its_images_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MANN_EXT_DATA", str(tmp_path / "empty"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ("reproduce", "metanet-miniimagenet", "--out", tmp_path / "out", "--only", "protonet-5")
    assert command(*words) == 2
    message = capsys.readouterr().err
    assert "miniImageNet was not found in" in message
    assert "test.csv (columns filename,label) and the folder images" in message

    folder = tmp_path / "images"
    for part, first in (("train", "a"), ("test", "b")):
        write_mini_imagenet(folder, {f"{first}{number}": 3 for number in range(5)})
        if part == "train":
            (folder / "test.csv").rename(folder / "train.csv")
    options = {"source": "omniglot", "data_root": folder, "only": ("protonet-5", "knn-5")}
    found = reproduced(tmp_path / "found", "metanet-miniimagenet", **options)
    assert found["protonet-5"]["data"] == "miniImageNet, 5 classes held out"
    assert found["protonet-5"]["config"]["episodes"]["source"] == "miniimagenet"


def test_runs_of_the_same_name_and_split_are_the_same_everywhere() -> None:
    known: dict[tuple[str, str], Any] = {}
    for name, entry in REPRODUCTIONS.items():
        if not name.startswith("metanet-"):
            continue
        for run in entry.runs:
            tasks = run.config.episodes
            key = (run.name, "mini" if tasks.source == "miniimagenet" else tasks.split)
            assert known.setdefault(key, run.config) == run.config
            if run.preset is not None:
                preset = PRESETS[run.preset][0]
                assert preset.episodes == tasks, "a variant by its model alone"
                assert preset.run == run.config.run


def test_lake_runs_become_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    from mann_ext.experiments.metanet_results import lake_runs

    images = torch.zeros(20, 20, 105, 105, dtype=torch.uint8)
    images[3, 4] = 1
    labels = torch.arange(20).flip(0).expand(20, -1)
    monkeypatch.setattr(data, "one_shot_runs", lambda root: OneShotRuns(images, images, labels))
    tasks: list[Tasks] = list(lake_runs(TINY_TASKS))
    assert len(tasks) == 20
    assert tasks[3].support.shape == (1, 20, 1, 28, 28)
    assert tasks[3].support[0, 4].min() == 1
    assert tasks[3].support.sum() == 28 * 28
    assert torch.equal(tasks[0].query_labels[0], labels[0])
    assert torch.equal(tasks[0].support_labels[0], torch.arange(20))


def test_a_checkpoint_of_a_metanet_is_loaded_as_it_was(tmp_path: Path) -> None:
    train(learner("metanet-plus", run_dir=tmp_path, final_episodes=0), "metanet-5way")
    task, model, preset, progress = training.load_run(tmp_path)
    assert isinstance(task, SupportQuery)
    assert isinstance(model, MetaNet)
    assert (preset, progress.step, model.variant) == ("metanet-5way", 6, "plus")
