"""The training loop: it learns, resumes bit for bit, stops cleanly, and reports what it did."""

from __future__ import annotations

import json
import math
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mann_ext import checkpoint, training
from mann_ext.checkpoint import CheckpointError
from mann_ext.distributed import Processes
from mann_ext.experiments import preset
from mann_ext.experiments.config import ConfigError, OptimiserConfig
from mann_ext.experiments.few_shot import Accuracy, FewShot, build_model, count
from mann_ext.experiments.santoro import (
    EvalOptions,
    ModelConfig,
    SantoroConfig,
    paper_name,
    paper_rows,
)
from mann_ext.memory import NTMMemory
from mann_ext.training import TrainingError, learning_rate, train
from tests.tiny_training import (
    TINY,
    assert_same_state,
    kill,
    metrics_of,
    random_delays,
    start,
    state_of,
    tiny,
    train_here,
    wait_for_checkpoint,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("finished")
    process = start(train_here, tiny(run_dir))
    process.join(60)
    assert process.exitcode == 0
    return run_dir


def test_a_run_killed_at_random_moments_ends_as_if_it_never_was(
    finished: Path, tmp_path: Path
) -> None:
    steps = []
    for delay in random_delays(5, 0.06):
        before = checkpoint.latest(tmp_path / "checkpoints")
        process = start(train_here, tiny(tmp_path), True)
        wait_for_checkpoint(tmp_path, before, process)
        process.join(delay)
        kill(process)
        newest = checkpoint.latest(tmp_path / "checkpoints")
        assert newest is not None
        steps.append(checkpoint.load(newest)["progress"]["step"])
    assert steps == sorted(set(steps)) or steps[-1] == TINY.run.minibatches
    assert 0 < steps[0] < TINY.run.minibatches, "the first kill came too late to test anything"
    process = start(train_here, tiny(tmp_path), True)
    process.join(60)
    assert process.exitcode == 0
    assert_same_state(state_of(tmp_path), state_of(finished))
    assert metrics_of(tmp_path) == metrics_of(finished)
    accuracies = [json.loads((path / "results.json").read_text()) for path in (tmp_path, finished)]
    assert accuracies[0]["accuracy"] == accuracies[1]["accuracy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_step_it_came_at(finished: Path, tmp_path: Path, number: int) -> None:
    # No periodic checkpoint: only the signal's.
    process = start(train_here, tiny(tmp_path, minibatches=100_000, checkpoint_every=100_000))
    metrics = tmp_path / "metrics.jsonl"
    while process.is_alive() and not (metrics.is_file() and metrics.stat().st_size):
        process.join(0.01)
    kill(process, number)
    assert process.exitcode == 0
    step = state_of(tmp_path)["progress"]["step"]
    assert 5 <= step < 100_000
    assert not (tmp_path / "results.json").exists()


def test_a_run_stopped_between_log_lines_loses_nothing(finished: Path, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    optimiser = replace(config.optimiser, schedule="constant")
    config = replace(config, optimiser=optimiser)
    whole = tmp_path / "whole"
    train(replace(config, run=replace(config.run, run_dir=whole, minibatches=20)), "tiny")
    for minibatches in (7, 13, 20):
        run = replace(config.run, run_dir=tmp_path / "parts", minibatches=minibatches)
        train(replace(config, run=run), "tiny", resume=True)
    assert_same_state(state_of(tmp_path / "parts"), state_of(whole))
    assert metrics_of(tmp_path / "parts") == metrics_of(whole)


def test_a_curriculum_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    growing = replace(TINY.episodes, ways=2, length=None, grow_every=16, ways_most=4)
    for folder, parts in (("whole", (20,)), ("parts", (3, 11, 20))):
        for minibatches in parts:
            config = tiny(tmp_path / folder, minibatches=minibatches, final_episodes=8)
            constant = replace(config.optimiser, schedule="constant")  # no share of the budget
            config = replace(config, episodes=growing, optimiser=constant)
            train(config, "tiny", resume=True)
    assert_same_state(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert state_of(tmp_path / "whole")["processes"][0]["sampler"]["drawn"] == 80
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["paper"] == {}, "the paper has no such table"
    other = training.evaluate_run(tmp_path / "whole", EvalOptions(episodes=4))
    assert other["config"]["episodes"]["ways_most"] == 4


def test_the_preset_of_the_ntms_row_in_table_2() -> None:
    config = preset("santoro-15way-strings-ntm")
    assert isinstance(config, SantoroConfig)
    model = build_model(config.model, 425, 25)
    assert isinstance(model.memory, NTMMemory)
    assert (model.memory.num_reads, model.memory.num_writes) == (4, 1)
    assert config.episodes.ways < config.episodes.test_ways == 15, "short episodes first"
    assert paper_rows(config)[paper_name(config.model)][-1] == 88.4


@pytest.mark.parametrize("memory", ["lrua", "ntm"])
def test_training_learns_what_can_be_learned(tmp_path: Path, memory: Any) -> None:
    # One class an episode: its string has to be guessed once and can be repeated from then on.
    config = tiny(tmp_path, minibatches=200, log_every=50, eval_every=0, final_episodes=64)
    config = replace(
        config,
        model=ModelConfig(memory=memory, hidden_size=32, num_slots=16, slot_size=12, num_reads=2),
        episodes=replace(
            config.episodes, augment=False, ways=1, length=5, labels="string", batch_size=16
        ),
        optimiser=OptimiserConfig(learning_rate=1e-2),
    )
    outcome = train(config, "tiny")
    losses = [record["loss"] for record in metrics_of(tmp_path) if record["kind"] == "train"]
    guessing = 5 * math.log(5)
    assert guessing / 5 < losses[-1] < 0.35 * guessing < losses[0]
    assert outcome.results is not None
    assert outcome.results["accuracy"]["1"] < 0.1
    assert outcome.results["accuracy"]["5"] > 0.5


def test_results_say_what_was_measured_and_how(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    assert results["episodes"] == TINY.run.final_episodes
    assert results["minibatches"] == TINY.run.minibatches
    assert results["training_episodes"] == 60 * TINY.episodes.batch_size
    assert set(results["half_width_95"]) == set(results["accuracy"])
    for name in ("command", "config", "seed", "version", "machine", "date", "training_seconds"):
        assert name in results
    assert "cores" in results["machine"]


def test_evaluating_a_finished_run_repeats_its_results(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = json.loads((finished / "results.json").read_text())
    file = tmp_path / "again.json"
    results = training.evaluate_run(finished, EvalOptions(episodes=40, json=file))
    assert results["accuracy"] == stored["accuracy"]
    assert json.loads(file.read_text())["accuracy"] == stored["accuracy"]
    assert "this run" in capsys.readouterr().out
    newest = training.find_checkpoint(finished)
    assert training.evaluate_run(newest, EvalOptions(episodes=40))["accuracy"] == stored["accuracy"]
    others = training.evaluate_run(finished, EvalOptions(episodes=40, num_slots=20, length=12))
    assert others["config"]["model"]["num_slots"] == 20


def test_a_finished_run_is_not_overwritten(finished: Path) -> None:
    before = state_of(finished)
    with pytest.raises(TrainingError, match="already holds a run"):
        train(tiny(finished), "tiny")
    assert_same_state(state_of(finished), before)


def test_a_run_is_not_resumed_as_another(finished: Path) -> None:
    other = replace(tiny(finished), model=replace(TINY.model, hidden_size=13))
    with pytest.raises(ConfigError, match="hidden_size: 12, now 13"):
        train(other, "tiny", resume=True)


def test_a_run_stopped_before_its_first_checkpoint_is_resumed_from_the_start(
    finished: Path, tmp_path: Path
) -> None:
    shutil.copy(finished / "config.json", tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"half a li')
    train(tiny(tmp_path), "tiny", resume=True)
    assert_same_state(state_of(tmp_path), state_of(finished))
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_damaged_checkpoint_is_reported_and_kept(finished: Path, tmp_path: Path) -> None:
    train(tiny(tmp_path, minibatches=6, final_episodes=0), "tiny")
    newest = checkpoint.latest(tmp_path / "checkpoints")
    assert newest is not None
    tensors = newest / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="step-000000006 is damaged"):
        train(tiny(tmp_path), "tiny", resume=True)
    assert checkpoint.latest(tmp_path / "checkpoints") == newest


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    process = start(train_here, tiny(tmp_path, minibatches=100_000))
    wait_for_checkpoint(tmp_path, None, process)
    with pytest.raises(TrainingError, match="another process is training"):
        train(tiny(tmp_path), "tiny", resume=True)
    kill(process)


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot write in the run's folder"):
        train(tiny(tmp_path / "file" / "run"), "tiny")


def test_a_loss_that_is_not_a_number_stops_the_run_and_is_not_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right_loss = FewShot.loss
    calls = []

    def loss(task: FewShot, model: nn.Module, episodes: object) -> tuple:
        value, tally = right_loss(task, model, episodes)  # type: ignore[arg-type]
        calls.append(1)
        return (value * math.nan if len(calls) == 8 else value), tally

    monkeypatch.setattr(FewShot, "loss", loss)
    with pytest.raises(TrainingError, match="not a number"):
        train(tiny(tmp_path), "tiny")
    assert state_of(tmp_path)["progress"]["step"] == 6


def test_a_time_limit_ends_the_run(tmp_path: Path) -> None:
    config = tiny(tmp_path, minibatches=None, max_minutes=0.5 / 60, checkpoint_every=100_000)
    outcome = train(config, "tiny")
    assert outcome.step > 0
    seconds = checkpoint.load(training.find_checkpoint(tmp_path))["progress"]["seconds"]
    assert 0.5 <= seconds < 5
    records = metrics_of(tmp_path)
    rates = [record["learning_rate"] for record in records if record["kind"] == "train"]
    assert rates[-1] < rates[0], "the schedule follows the share of the time that is spent"


def test_choosing_the_threads_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training.evaluation, "usable_cpus", lambda: 2)
    threads = torch.get_num_threads()
    task = FewShot(TINY, torch.device("cpu"))
    model = task.model()
    expected = task.training_episodes.sample()
    task = FewShot(TINY, torch.device("cpu"))
    random = torch.get_rng_state()
    try:
        assert training._threads(task, model, Processes()) in (1, 2)
        assert training._threads(task, model, Processes(count=2, local_count=2)) == 1
        assert_same_state(tuple(task.training_episodes.sample()), tuple(expected))
        assert torch.equal(torch.get_rng_state(), random)
        assert all(parameter.grad is None for parameter in model.parameters())

        # Resumed, a run goes on with as many as before, even where another number is quicker.
        monkeypatch.setattr(training, "_threads", lambda *_: 2)
        train(tiny(tmp_path, threads=0, minibatches=6, final_episodes=0), "tiny")
        monkeypatch.setattr(training, "_threads", lambda *_: 1)
        train(tiny(tmp_path, threads=0, minibatches=9, final_episodes=0), "tiny", resume=True)
        assert state_of(tmp_path)["progress"]["threads"] == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_learning_rate_follows_its_schedule(schedule: Any) -> None:
    config = OptimiserConfig(
        learning_rate=2.0, schedule=schedule, final_learning_rate=0.1, warmup=10
    )
    assert learning_rate(config, 0, 0.0) == pytest.approx(0.2)
    assert learning_rate(config, 9, 0.0) == pytest.approx(2.0)
    middle = {"constant": 2.0, "cosine": 1.1, "linear": 1.1}
    assert learning_rate(config, 50, 0.5) == pytest.approx(middle[schedule])
    end = 2.0 if schedule == "constant" else 0.2
    assert learning_rate(config, 100, 1.0) == pytest.approx(end)


@pytest.mark.parametrize("kind", ["mann", "lstm", "feedforward"])
@pytest.mark.parametrize("labels", ["one_hot", "string"])
def test_every_model_trains_on_every_kind_of_label(kind: Any, labels: Any) -> None:
    config = replace(
        TINY,
        model=replace(TINY.model, kind=kind),
        episodes=replace(TINY.episodes, labels=labels),
    )
    task = FewShot(config, torch.device("cpu"))
    model = task.model()
    episodes = task.training_episodes.sample()
    loss, tally = task.loss(model, episodes)
    loss.backward()
    chance = math.log(3) if labels == "one_hot" else 5 * math.log(5)
    assert loss.item() == pytest.approx(chance, rel=0.2), "an untrained model guesses"
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert tally[1].sum() == episodes.instances.numel()


def test_rmsprop_autocast_and_float64_train(tmp_path: Path) -> None:
    for number, run in enumerate(({"autocast": "bfloat16"}, {"dtype": "float64"})):
        config = tiny(tmp_path / str(number), minibatches=10, final_episodes=0, **run)
        config = replace(config, optimiser=OptimiserConfig(optimiser="rmsprop"))
        train(config, "tiny")
        model = state_of(tmp_path / str(number))["model"]
        dtype = torch.float64 if "dtype" in run else torch.float32
        assert {tensor.dtype for tensor in model.values()} == {dtype}


def test_counts_by_instance_against_a_loop() -> None:
    from mann_ext.data import Episodes

    generator = torch.Generator().manual_seed(3)
    instances = torch.randint(1, 14, (30, 4), generator=generator)
    for shape in ((30, 4), (30, 4, 5)):
        targets = torch.randint(2, shape, generator=generator)
        logits = torch.randn(*shape, 2, generator=generator)
        episodes = Episodes(torch.empty(30, 4, 0), targets, instances, torch.zeros_like(instances))
        counts = count(logits, episodes)
        expected = torch.zeros(4, 2, 10)
        for t in range(30):
            for b in range(4):
                if instances[t, b] <= 10:
                    right = bool((logits[t, b].argmax(-1) == targets[t, b]).all())
                    expected[b, 0, instances[t, b] - 1] += right
                    expected[b, 1, instances[t, b] - 1] += 1
        assert torch.equal(counts, expected)


def test_the_confidence_interval_covers_the_truth_19_times_in_20() -> None:
    generator = torch.Generator().manual_seed(5)
    covered, trials = 0, 1000
    for _ in range(trials):
        # Episodes are easy or hard as a whole, and show a class a varying number of times.
        chance = torch.where(torch.rand(200, 1, generator=generator) < 0.5, 0.9, 0.5)
        shown = torch.randint(0, 6, (200, 1), generator=generator).double()
        correct = torch.binomial(shown, chance.double(), generator=generator)
        accuracy = Accuracy(correct, shown)
        covered += abs(accuracy.means()[0] - 0.7) <= accuracy.half_widths()[0]
    assert 0.93 < covered / trials < 0.97


def test_saved_configurations_come_back(finished: Path) -> None:
    config, preset = training.load_config(finished)
    assert config == tiny(finished)
    assert preset == "tiny"
    from_checkpoint, _ = training.load_config(training.find_checkpoint(finished))
    assert from_checkpoint == config
    assert isinstance(config, SantoroConfig)
