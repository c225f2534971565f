"""Omniglot, then MNIST with the meta weights kept, and back (Munkhdalai & Yu 2017)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mann_ext import data, evaluation, training
from mann_ext.experiments.classification import sample
from mann_ext.experiments.metanet_mnist import digits
from mann_ext.experiments.reproduction import Reproduction, Results, Run
from mann_ext.experiments.support_query_task import SupportQuery, summary
from mann_ext.models import MetaNet
from mann_ext.reporting import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EVERY = 400
"""Tasks of MNIST between two measurements."""
POINTS = 8
MNIST_TASKS = 100
"""Tasks for the accuracy on MNIST on the way."""
PERMUTATION = 1
"""Seed of the order of the pixels."""


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy on held-out tasks of Omniglot before and while the same meta weights are trained on
    MNIST."""
    assert trained is not None
    task, model, preset, progress = training.load_run(trained, config)
    assert isinstance(task, SupportQuery)
    assert isinstance(model, MetaNet)
    started = time.perf_counter()
    points = back_and_forth(task, model, episodes)
    return {
        "points": points,
        "zero_crossing": zero_crossing([(point["tasks"], point["change"]) for point in points]),
        "episodes": episodes,
        "data": f"{task.data_name}; MNIST, its pixels permuted",
        "preset": preset,
        "minibatches": progress.step,
        "training_seconds": round(progress.seconds, 1),
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        **evaluation.provenance(config),
    }


def back_and_forth(task: SupportQuery, model: MetaNet, episodes: int) -> list[dict[str, Any]]:
    """Accuracy on Omniglot, its change and its 95 % interval over the same tasks, and accuracy on
    MNIST, after every EVERY tasks of MNIST.

    ``model`` is trained; its slow weights for MNIST start from new random numbers.
    """
    config = task.config
    ways, seed = config.episodes.ways, config.run.seed
    images, test = (
        (data.permute_pixels(pixels, PERMUTATION), class_of)
        for pixels, class_of in (digits(config.episodes, train) for train in (True, False))
    )
    sampler = task.sampler(images, ways, seed, config.episodes.batch_size)
    omniglot = [weight.detach().clone() for weight in model.slow_parameters()]

    def on_omniglot() -> Tensor:
        # The slow weights for Omniglot are put back for as long as it is measured.
        mnist = [weight.detach().clone() for weight in model.slow_parameters()]
        _put(model, omniglot)
        shares = task.accuracies(model, task.held_out_tasks(episodes))
        _put(model, mnist)
        return shares

    before = on_omniglot()
    torch.manual_seed(seed)
    model.reset_slow_weights()
    optimiser = training.build_optimiser(model, config.optimiser)
    points: list[dict[str, Any]] = []
    for number in range(POINTS + 1):
        for _ in range(EVERY if number else 0):
            loss, _ = task.loss(model, sampler.sample())
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.optimiser.clip_norm)
            optimiser.step()
        after = on_omniglot() if number else before
        change = summary({"omniglot": after, "change": after - before})
        digits_right = task.accuracies(model, task.tasks_of(test, MNIST_TASKS, ways)).mean()
        points.append(
            {
                "tasks": number * EVERY * config.episodes.batch_size,
                **change["accuracy"],
                "half_width_95": change["half_width_95"],
                "mnist": digits_right.item(),
            }
        )
    return points


@torch.no_grad()
def _put(model: MetaNet, weights: Sequence[Tensor]) -> None:
    for weight, value in zip(model.slow_parameters(), weights, strict=True):
        weight.copy_(value)


def zero_crossing(curve: Sequence[tuple[float, float]]) -> float | None:
    """Where a curve of points (x, y) first goes from above to below zero, by lines between them;
    None: nowhere."""
    for (left, above), (right, below) in pairwise(curve):
        if above > 0 >= below:
            return left + (right - left) * above / (above - below)
    return None


def tables(reproduction: Reproduction, results: Results) -> list[Table]:
    """The change on Omniglot by tasks of MNIST, a table for each learner."""
    found = []
    for run in reproduction.runs:
        for values in results.get(run.name, ()):
            points = values["points"]
            widths = [point["half_width_95"] for point in points]
            rows = [
                ("Omniglot", *(f"{100 * point['omniglot']:.2f}" for point in points)),
                ("  95 % interval", *(f"±{100 * width['omniglot']:.2f}" for width in widths)),
                ("change", *(f"{100 * point['change']:+.2f}" for point in points)),
                ("  95 % interval", *(f"±{100 * width['change']:.2f}" for width in widths)),
                ("permuted MNIST", *(f"{100 * point['mnist']:.1f}" for point in points)),
            ]
            crossing = values["zero_crossing"]
            words = "none" if crossing is None else f"at {crossing:,.0f} tasks"
            title = (
                f"{run.label}: accuracy (%) after tasks of MNIST, {sample([values])}; zero "
                f"crossing of the change: {words}"
            )
            columns = ("tasks of MNIST", *(f"{point['tasks']:,}" for point in points))
            found.append(Table(title, columns, tuple(rows)))
    return found


def figures(reproduction: Reproduction, results: Results) -> dict[str, Figure]:
    """The change on Omniglot with its 95 % interval, and the accuracy on MNIST below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained", dpi=110)
    change, mnist = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for run in reproduction.runs:
        for values in results.get(run.name, ()):
            points = values["points"]
            tasks = [point["tasks"] for point in points]
            (line, *_) = change.errorbar(
                tasks,
                [100 * point["change"] for point in points],
                yerr=[100 * point["half_width_95"]["change"] for point in points],
                marker="o", markersize=4, capsize=2, label=f"{run.label}, seed {values['seed']}",
            )  # fmt: skip
            if values["zero_crossing"] is not None:
                change.axvline(
                    values["zero_crossing"], color=line.get_color(), linestyle=":", linewidth=1
                )
            mnist.plot(tasks, [100 * point["mnist"] for point in points], marker="o", markersize=4)
    change.axhline(0, color="black", linewidth=0.8)
    change.set(ylabel="change on Omniglot (points)")
    mnist.set(xlabel="tasks of permuted MNIST", ylabel="permuted MNIST (%)")
    for axes in (change, mnist):
        axes.grid(alpha=0.25)
    change.legend(fontsize=8)
    return {"": figure}
