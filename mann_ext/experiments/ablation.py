"""What each choice of the preset santoro-5way is worth, one change at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mann_ext.experiments.classification import accuracy_of, effort
from mann_ext.experiments.reproduction import Reproduction, Results, Run
from mann_ext.reporting import Table, ordinal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {"2": "#d95f02", "5": "#1b9e77", "10": "#3b6fb6"}
"""Instances in the table and the figure, and their colours."""


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy on held-out classes."""
    assert trained is not None
    return accuracy_of(trained, config, episodes)


def tables(reproduction: Reproduction, results: Results) -> list[Table]:
    """Mean and, of several, range over the seeds, at the 2nd, 5th and 10th instance."""
    rows: list[tuple[str, ...]] = []
    for run in reproduction.runs:
        if run.name in results:
            own = results[run.name]
            accuracies = [_mean_and_range(own, instance) for instance in SHOWN]
            rows.append((run.label, *accuracies, str(len(own)), effort(own)))
    columns = ("change", *(ordinal(int(name)) for name in SHOWN), "seeds", "each after")
    return [Table("Accuracy (%) by instance, mean (lowest to highest)", columns, tuple(rows))]


def figures(reproduction: Reproduction, results: Results) -> dict[str, Figure]:
    """A line for each change: the mean as a point, the range over the seeds as a bar."""
    from matplotlib.figure import Figure

    runs = [run for run in reproduction.runs if run.name in results]
    if not runs:
        return {}
    figure = Figure(figsize=(9, 1.5 + 0.32 * len(runs)), layout="constrained", dpi=110)
    axes = figure.subplots()
    for offset, (instance, colour) in zip((-0.2, 0.0, 0.2), SHOWN.items(), strict=True):
        for line, run in enumerate(runs):
            values = _percent(results[run.name], instance)
            if not values:
                continue
            axes.plot([min(values), max(values)], [line + offset] * 2, color=colour, alpha=0.5)
            axes.plot(sum(values) / len(values), line + offset, "o", color=colour, markersize=4)
        axes.plot([], [], "o", color=colour, label=f"{ordinal(int(instance))} instance")
    axes.set(yticks=range(len(runs)), xlabel="accuracy (%), mean and range over the seeds")
    axes.set_yticklabels([run.label for run in runs], fontsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.25)
    axes.legend(
        fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(SHOWN), frameon=False
    )
    return {"": figure}


def _percent(own: Sequence[dict[str, Any]], instance: str) -> list[float]:
    return [100 * result["accuracy"][instance] for result in own if instance in result["accuracy"]]


def _mean_and_range(own: Sequence[dict[str, Any]], instance: str) -> str:
    values = _percent(own, instance)
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{sum(values) / len(values):.1f} ({min(values):.1f} to {max(values):.1f})"
