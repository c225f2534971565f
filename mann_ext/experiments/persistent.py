"""Figure 3 of Santoro et al. (2016): episodes in a row with a memory that is not wiped."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from mann_ext import evaluation, training
from mann_ext.experiments.few_shot import Accuracy, FewShot, accuracy, count
from mann_ext.experiments.reproduction import Reproduction, Results, Run
from mann_ext.models import MANN, MANNState
from mann_ext.reporting import Table, ordinal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PRETRAINED = "omniglot-5way"
IN_A_ROW = 10
Carry = Literal["nothing", "memory", "everything"]
"""What goes on from one episode to the next. The memory's state is its content, the usage and the
read weights; the rest is the controller's state and the last reads."""
CARRIES: dict[Carry, str] = {
    "nothing": "wiped",
    "memory": "kept",
    "everything": "kept, and the controller's state",
}
SHOWN = {"2": "#d95f02", "5": "#1b9e77", "10": "#3b6fb6"}
"""Instances in the tables and figures, and their colours; those an episode shows often enough."""


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy by instance in each of IN_A_ROW episodes in a row, for everything that can be
    carried; ``episodes`` is the number of such rows of episodes."""
    if trained is None:
        task, model = FewShot(config, torch.device("cpu")), MANN.from_pretrained(PRETRAINED)
        origin: dict[str, Any] = {"pretrained": PRETRAINED}
    else:
        trained_task, network, preset, progress = training.load_run(trained, config)
        assert isinstance(trained_task, FewShot)
        assert isinstance(network, MANN)
        task, model = trained_task, network
        origin = {
            "preset": preset,
            "minibatches": progress.step,
            "training_seconds": round(progress.seconds, 1),
        }
    started = time.perf_counter()
    carried = {carry: in_a_row(task, model, carry, episodes) for carry in CARRIES}
    return {
        "carried": {carry: [each.summary() for each in found] for carry, found in carried.items()},
        "episodes": carried["nothing"][0].episodes,
        "in_a_row": IN_A_ROW,
        "data": task.data_name,
        **origin,
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        **evaluation.provenance(config),
    }


@torch.inference_mode()
def in_a_row(task: FewShot, model: MANN, carry: Carry, rows: int) -> list[Accuracy]:
    """The accuracy in the first, second ... of IN_A_ROW consecutive episodes, over at least
    ``rows`` rows of them; the same episodes whatever is carried."""
    # A row of a minibatch is a row of episodes, so as many minibatches make a whole number of them.
    groups = math.ceil(rows / task.config.episodes.batch_size)
    batches = task.held_out_episodes(groups * IN_A_ROW * task.config.episodes.batch_size)
    counts: list[list[torch.Tensor]] = [[] for _ in range(IN_A_ROW)]
    state: MANNState | None = None
    for number, batch in enumerate(batches):
        position = number % IN_A_ROW
        if position == 0 or carry == "nothing":
            state = None
        elif carry == "memory":
            assert state is not None
            state = model.initial_state(batch.inputs.shape[1])._replace(memory=state.memory)
        logits, state = model(batch.inputs.to(task.dtype), state)
        counts[position].append(count(logits, batch))
    return [accuracy(each) for each in counts]


def tables(reproduction: Reproduction, results: Results) -> list[Table]:
    """For each number of classes and instance: accuracy in each of the episodes in a row."""
    found = []
    for run in reproduction.runs:
        own = results.get(run.name, ())
        if not own:
            continue
        for instance in _shown(own[0]):
            rows: list[tuple[str, ...]] = []
            for carry, words in CARRIES.items():
                points = [_point(own, carry, position) for position in range(own[0]["in_a_row"])]
                rows.append((words, *(f"{100 * means[instance]:.1f}" for means, _ in points)))
                widths = (f"±{100 * half[instance]:.1f}" for _, half in points)
                rows.append(("  95 % interval", *widths))
            columns = ("memory", *(ordinal(i + 1) for i in range(own[0]["in_a_row"])))
            title = (
                f"{run.label} in {run.config.episodes.length or 10 * run.config.episodes.ways} "
                f"steps: accuracy (%) at the {ordinal(int(instance))} instance, by episode in a row"
            )
            found.append(Table(title, columns, tuple(rows)))
    return found


def figures(reproduction: Reproduction, results: Results) -> dict[str, Figure]:
    """A row for each number of classes, a column for each thing that is carried."""
    from matplotlib.figure import Figure

    runs = [run for run in reproduction.runs if run.name in results]
    if not runs:
        return {}
    figure = Figure(figsize=(12, 3.6 * len(runs)), layout="constrained", dpi=110)
    grid = figure.subplots(len(runs), len(CARRIES), squeeze=False, sharey=True)
    for line, run in zip(grid, runs, strict=True):
        own = results[run.name]
        for axes, (carry, words) in zip(line, CARRIES.items(), strict=True):
            points = [_point(own, carry, position) for position in range(own[0]["in_a_row"])]
            for instance in _shown(own[0]):
                axes.errorbar(
                    range(1, len(points) + 1),
                    [100 * means[instance] for means, _ in points],
                    yerr=[100 * widths[instance] for _, widths in points],
                    color=SHOWN[instance], marker="o", markersize=4, capsize=2,
                    label=f"{ordinal(int(instance))} instance",
                )  # fmt: skip
            axes.set(
                xlabel="episode in a row", ylim=(0, 101), xticks=range(1, len(points) + 1),
            )  # fmt: skip
            axes.set_title(f"{run.label}, memory {words}", fontsize=9)
            axes.grid(alpha=0.25)
        line[0].set_ylabel("accuracy (%)")
    grid[0][0].legend(fontsize=8)
    return {"": figure}


def _point(own: Any, carry: Carry, position: int) -> tuple[dict[str, float], dict[str, float]]:
    return evaluation.across_seeds([result["carried"][carry][position] for result in own])


def _shown(result: dict[str, Any]) -> list[str]:
    return [name for name in SHOWN if name in result["carried"]["nothing"][0]["accuracy"]]
