"""Functions learned from their points: losses, training, resuming, results, tables and figures."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from mann_ext import training
from mann_ext.experiments import ConfigError, function_results, saved_config
from mann_ext.experiments.config import ExperimentConfig, OptimiserConfig, to_json
from mann_ext.experiments.function_task import half_widths
from mann_ext.experiments.functions import (
    GaussianProcessConfig,
    QuadraticsConfig,
    QuadraticsEpisodesConfig,
    RegressionConfig,
)
from mann_ext.experiments.regression import EXACT
from mann_ext.experiments.santoro import EvalOptions, ModelConfig
from mann_ext.training import train
from tests.test_cli import run
from tests.tiny_training import TINY, assert_same_state, metrics_of, state_of

CPU = torch.device("cpu")
RUN = replace(TINY.run, minibatches=12, log_every=4, eval_every=6, final_episodes=12)
REGRESSION = RegressionConfig(
    model=TINY.model, episodes=GaussianProcessConfig(length=9, batch_size=4), run=RUN
)
QUADRATICS = QuadraticsConfig(
    model=ModelConfig(kind="lstm", hidden_size=12),
    episodes=QuadraticsEpisodesConfig(length=9, batch_size=4),
    run=RUN,
)
BOTH = pytest.mark.parametrize("config", [REGRESSION, QUADRATICS], ids=lambda c: c.name)


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)


def changed(config: Any, **run: Any) -> Any:
    return replace(config, run=replace(config.run, **run))


class Prior(nn.Module):
    """Answers with the mean and log-variance of a value that nothing is known of."""

    def __init__(self, variance: float) -> None:
        super().__init__()
        self.answer = torch.tensor([0.0, math.log(variance)])

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.answer.expand(*x.shape[:2], 2), None


def test_the_regression_loss_is_the_negative_log_likelihood() -> None:
    task = REGRESSION.task(CPU)
    outputs, targets = torch.randn(9, 4, 2), torch.randn(9, 4)
    normal = torch.distributions.Normal(outputs[..., 0], (outputs[..., 1] / 2).exp())
    torch.testing.assert_close(task.errors(outputs, targets), -normal.log_prob(targets))


@BOTH
def test_an_untrained_model_has_a_loss_and_gradients(config: ExperimentConfig) -> None:
    task = config.task(CPU)
    model = task.model()
    loss, tally = task.loss(model, task.training_episodes.sample())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    sums, counts = tally
    assert torch.equal(counts, torch.full((9,), 4.0))
    assert (sums / counts).mean().item() == pytest.approx(loss.item(), rel=1e-6)


def test_who_knows_nothing_is_as_good_as_the_exact_process_at_the_first_point_only() -> None:
    task = REGRESSION.task(CPU)
    count, metrics = task.evaluate(Prior(1.0 + 0.1**2), 400)
    assert count == 400
    exact = metrics["baselines"][EXACT]
    assert exact["difference"]["0"] == pytest.approx(0.0, abs=1e-6)
    assert exact["difference"]["8"] > 5 * exact["difference_half_width_95"]["8"] > 0
    assert metrics["nll"]["8"] - exact["nll"]["8"] == pytest.approx(exact["difference"]["8"])
    assert metrics["mean"]["value"] == pytest.approx(sum(metrics["nll"].values()) / 9)


def test_the_baselines_of_the_quadratics() -> None:
    task = QUADRATICS.task(CPU)
    functions = task.training_episodes.sample()
    errors = task.baselines(functions)
    y = functions.targets.double()
    means = errors["mean of earlier values"]
    torch.testing.assert_close(means[0], (y[0] - 0.5).square())
    torch.testing.assert_close(means[5], (y[:5].mean(0) - y[5]).square())
    torch.testing.assert_close(errors["least squares"][0], means[0])
    assert errors["least squares"][7:].max() < 1e-7


def test_the_intervals_are_those_of_independent_functions() -> None:
    errors = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    # The variance of 1, 2, 3, 4 is 5/3.
    assert half_widths(errors) == pytest.approx([1.959964 * math.sqrt(5 / 3 / 4)])


@BOTH
def test_a_stopped_run_ends_as_if_it_never_was(config: ExperimentConfig, tmp_path: Path) -> None:
    config = replace(config, optimiser=OptimiserConfig(schedule="constant"))
    whole = train(changed(config, run_dir=tmp_path / "whole"), "tiny")
    for minibatches in (5, 12):
        parts = changed(config, run_dir=tmp_path / "parts", minibatches=minibatches)
        resumed = train(parts, "tiny", resume=True)
    assert_same_state(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert whole.results is not None
    assert resumed.results is not None
    metric = whole.results["metric"]
    assert resumed.results[metric] == whole.results[metric]
    kinds = [(record["kind"], record["step"]) for record in metrics_of(tmp_path / "whole")]
    assert kinds == [("train", 4), ("eval", 6), ("train", 8), ("train", 12), ("eval", 12)]
    assert all(len(record[metric]) == 9 for record in metrics_of(tmp_path / "whole"))


def test_training_learns_what_can_be_learned(tmp_path: Path) -> None:
    # Functions that hardly change: the next value is the mean of those before.
    config = RegressionConfig(
        model=ModelConfig(hidden_size=32, num_slots=8, slot_size=8, num_reads=1),
        episodes=GaussianProcessConfig(lengthscale=50.0, length=8),
        optimiser=OptimiserConfig(learning_rate=1e-2),
        run=replace(RUN, minibatches=120, eval_every=0, final_episodes=400, run_dir=tmp_path),
    )
    results = train(config, "tiny").results
    assert results is not None
    exact = results["baselines"][EXACT]
    knows_nothing = 0.5 * (math.log(2 * math.pi * 1.01) + 1)
    assert results["nll"]["7"] < 0 < 0.9 * knows_nothing < results["nll"]["0"]
    assert exact["mean_difference"]["value"] > 0, "nobody is better than who knows the process"


@BOTH
def test_results_tables_and_figures(
    config: ExperimentConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = changed(config, run_dir=tmp_path, figure=True, tensorboard=True)
    results = train(config, "tiny").results
    assert results is not None
    out = capsys.readouterr().out
    metric = results["metric"]
    assert "never-seen functions" in out
    assert f"excess over {next(iter(results['baselines']))}" in out
    assert (tmp_path / f"{metric}.png").read_bytes().startswith(b"\x89PNG")
    assert any((tmp_path / "tensorboard").iterdir())
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored == json.loads(json.dumps(results))
    assert results["experiment"] == config.name
    again = training.evaluate_run(tmp_path, EvalOptions(episodes=12))
    assert again[metric] == results[metric]
    with pytest.raises(ConfigError, match=r"ways: .* has no such option"):
        training.evaluate_run(tmp_path, EvalOptions(ways=3))

    runs = [SimpleNamespace(name="one", label="A"), SimpleNamespace(name="missing", label="B")]
    reproduction = SimpleNamespace(runs=runs)
    measured = {"one": [function_results.measure(runs[0], config, tmp_path, 12)]}
    (table,) = function_results.tables(reproduction, measured)
    assert table.columns == ("points seen", "0", "1", "2", "5", "8", "mean")
    assert [row[0] for row in table.rows[:4]] == ["A", "  ±", "  excess", "  ±"]
    assert table.rows[0][1] == f"{results[metric]['0']:{function_results.FORMATS[metric]}}"
    assert all(len(row) == len(table.columns) for row in table.rows)
    assert set(function_results.figures(reproduction, measured)) == (
        {"", "example"} if metric == "nll" else {""}
    )
    measured["one"] *= 2
    (table,) = function_results.tables(reproduction, measured)
    assert table.rows[0][0] == "A, seed 0"


def test_an_example_shows_the_points_and_asks_everywhere() -> None:
    task = REGRESSION.task(CPU)
    example = task.example(Prior(4.0))
    functions = next(task.held_out_functions(1))
    assert example["y"] == functions.targets[:8, 0].tolist()
    assert example["predictions"]["model"]["standard_deviation"] == pytest.approx([2.0] * 201)
    exact = example["predictions"][EXACT]
    nearest = min(range(201), key=lambda i: abs(example["at"][i] - example["x"][0]))
    assert abs(exact["mean"][nearest] - example["y"][0]) < 4 * 0.1
    assert min(exact["standard_deviation"]) > 0.1
    two = replace(REGRESSION, episodes=replace(REGRESSION.episodes, dimensions=2)).task(CPU)
    assert "example" not in two.details(two.model())


def test_a_run_is_not_resumed_as_another_experiment(tmp_path: Path) -> None:
    train(changed(REGRESSION, run_dir=tmp_path, final_episodes=0), "tiny")
    other = changed(QUADRATICS, run_dir=tmp_path)
    with pytest.raises(ConfigError, match="is a run of regression, and this one is of quadratics"):
        train(other, "tiny", resume=True)
    config, preset = training.load_config(tmp_path)
    assert config == changed(REGRESSION, run_dir=tmp_path, final_episodes=0)
    assert preset == "tiny"


def test_saved_configurations_know_their_experiment() -> None:
    assert saved_config({"config": to_json(TINY)}, "x") == TINY, "runs of the first releases"
    saved = {"experiment": "quadratics", "config": to_json(QUADRATICS)}
    assert saved_config(saved, "x") == QUADRATICS
    with pytest.raises(ConfigError, match="x: unknown experiment 'chess'; expected one of few-"):
        saved_config({**saved, "experiment": "chess"}, "x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--length", "0"], "length: expected at least 1, got 0"),
        (["--dimensions", "0"], "dimensions: expected at least 1, got 0"),
        (["--noise", "0"], "expected noise of at least 1e-4"),
        (["--lengthscale", "-1"], "expected lengthscale above 0, got -1"),
        (["--read-strength", "-1"], "read_strength"),
    ],
)
def test_mistakes_get_one_clear_message(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    assert run("train", "santoro-regression-1d", "--run-dir", run_dir, *words) == 2
    assert message in capsys.readouterr().err
    assert not run_dir.exists()


def test_the_command_line_trains_the_quadratics(tmp_path: Path) -> None:
    small = "--hidden-size 8 --length 6 --batch-size 4 --minibatches 4 --final-episodes 8".split()
    words = ["train", "hochreiter-quadratics", "--run-dir", tmp_path, "--no-figure"]
    assert run(*words, *small, "--threads", 1, "--no-tensorboard") == 0
    assert run(*words, "--resume", "--minibatches", 6) == 0
    assert json.loads((tmp_path / "results.json").read_text())["minibatches"] == 6
    assert run("eval", tmp_path, "--episodes", 8, "--length", 9) == 0
