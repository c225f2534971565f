"""Figures of a run: accuracy by instance against episodes, and at the end, with the paper's."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mann_ext.checkpoint import replace_file
from mann_ext.reporting import ordinal, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURE = "accuracy.png"
CURVES = {"1": "#9aa0a6", "2": "#d95f02", "5": "#1b9e77", "10": "#3b6fb6"}
"""Instances drawn as curves, and their colours."""


def available() -> bool:
    """Whether figures can be drawn; where matplotlib is missing, says so."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print("no figure: matplotlib is missing (pip install 'mann_ext[figures]')")
        return False
    return True


def draw_run(run_dir: Path) -> Path | None:
    """Draw ``accuracy.png`` from a run's metrics.jsonl and, if it is there, results.json.

    Returns:
        The figure's path, or None, with a message, where matplotlib is missing.
    """
    if not available():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_metrics(run_dir)
    results = _results(run_dir)
    figure = Figure(figsize=(12, 5), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    paper = _paper(results)
    draw_curves(left, records, paper)
    draw_by_instance(right, results, records)
    path = run_dir / FIGURE
    save(figure, path)
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and say where."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    print(f"figure: {path}")


def draw_curves(axes: Axes, records: list[dict[str, Any]], paper: dict[str, float]) -> None:
    """Accuracy by instance against episodes: training classes thin, held-out classes thick, the
    paper's figure as a dashed line."""
    for instance, colour in CURVES.items():
        label = ordinal(int(instance))
        for kind, style in (
            ("eval", {"linewidth": 1.8, "marker": "o", "markersize": 3.0}),
            ("train", {"linewidth": 0.8, "alpha": 0.45}),
        ):
            points = [
                (record["episodes"], 100 * record["accuracy"][instance])
                for record in records
                if record["kind"] == kind and instance in record["accuracy"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=label, **style)
                label = "_" + label
        if instance in paper:
            axes.axhline(100 * paper[instance], color=colour, linestyle="--", linewidth=1.0)
    axes.plot([], [], color="black", linewidth=1.8, marker="o", markersize=3.0, label="held-out")
    axes.plot([], [], color="black", linewidth=0.8, alpha=0.45, label="training")
    if paper:
        axes.plot([], [], color="black", linestyle="--", linewidth=1.0, label="paper, held-out")
    axes.set(xlabel="episodes", ylabel="accuracy (%)", ylim=(0, 101))
    axes.set_title("Accuracy by instance during training", fontsize=10)
    axes.grid(alpha=0.25)
    # Curves can be anywhere, so the legend goes below them.
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=7, frameon=False)


def draw_by_instance(axes: Axes, results: dict[str, Any], records: list[dict[str, Any]]) -> None:
    """Held-out accuracy by instance with its 95 % interval, beside the paper's."""
    measured = results or next((r for r in reversed(records) if r["kind"] == "eval"), {})
    accuracy = measured.get("accuracy", {})
    for name, values in results.get("paper", {}).items():
        instances = [int(instance) for instance in values]
        own = name == results["paper_name"]
        axes.plot(
            instances,
            [100 * value for value in values.values()],
            linestyle="--",
            marker="s" if own else None,
            markersize=4,
            linewidth=1.4 if own else 0.9,
            color="#d95f02" if own else None,
            alpha=1.0 if own else 0.6,
            label=f"paper, {name}",
        )
    if accuracy:
        widths = measured["half_width_95"]
        axes.errorbar(
            [int(instance) for instance in accuracy],
            [100 * value for value in accuracy.values()],
            yerr=[100 * widths.get(instance, 0.0) for instance in accuracy],
            color="#3b6fb6",
            marker="o",
            markersize=4,
            capsize=2,
            linewidth=1.8,
            label="this run",
        )
    axes.set(xlabel="instance", ylim=(0, 101), xticks=range(1, 11))
    axes.set_title("Held-out classes, at the end", fontsize=10)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=3, frameon=False
        )


def _results(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return results


def _paper(results: dict[str, Any]) -> dict[str, float]:
    """The paper's accuracies of the model that was trained."""
    values: dict[str, float] = results.get("paper", {}).get(results.get("paper_name"), {})
    return values
