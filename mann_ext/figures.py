"""Figures of a run (accuracy by instance against episodes, and at the end, with the paper's) and of
an episode (what the memory did)."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mann_ext.checkpoint import replace_file
from mann_ext.reporting import ordinal, read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from mann_ext.experiments.santoro import SlotOrder
    from mann_ext.inspection import SlotRows, TracedEpisode

FIGURE = "accuracy.png"
CURVES = {"1": "#9aa0a6", "2": "#d95f02", "5": "#1b9e77", "10": "#3b6fb6"}
"""Instances drawn as curves, and their colours."""
IMAGES_A_ROW = 25


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
    figure = _figure(12, 5)
    if figure is None:
        return None
    records = read_metrics(run_dir)
    results = _results(run_dir)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    paper = _paper(results)
    draw_curves(left, records, paper)
    draw_by_instance(right, results, records)
    return save(figure, run_dir / FIGURE)


def _figure(width: float, height: float) -> Figure | None:
    """A figure of that size in inches, or None, with a message, where matplotlib is missing."""
    if not available():
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write a figure as PNG, whole or not at all, and say where."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    replace_file(path, picture.getvalue())
    print(f"figure: {path}")
    return path


def draw_tasks(run_dir: Path) -> Path | None:
    """The same for tasks of support images and queries: accuracy by the number of classes."""
    figure = _figure(7, 5)
    if figure is None:
        return None
    records = read_metrics(run_dir)
    ways = dict.fromkeys(name for record in records for name in record["accuracy"])
    curves = dict(zip(ways, ("#3b6fb6", "#d95f02"), strict=False))
    axes = figure.subplots()
    draw_curves(axes, records, _paper(_results(run_dir)), curves, lambda name: f"{name}-way")
    axes.set_title("Accuracy during training", fontsize=10)
    return save(figure, run_dir / FIGURE)


def draw_curves(
    axes: Axes,
    records: list[dict[str, Any]],
    paper: dict[str, float],
    curves: Mapping[str, str] = CURVES,
    words: Callable[[str], str] = lambda instance: ordinal(int(instance)),
) -> None:
    """Accuracy by instance against episodes: training classes thin, held-out classes thick, the
    paper's figure as a dashed line.

    Args:
        axes: where to draw.
        records: of metrics.jsonl.
        paper: the paper's accuracies.
        curves: the keys of the accuracies to draw, such as instances, and their colours.
        words: what the legend calls a key.
    """
    for instance, colour in curves.items():
        label = words(instance)
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


def draw_episode(
    episode: TracedEpisode, path: Path, *, step: int | None = None, slots: SlotOrder = "index"
) -> Path | None:
    """Draw one episode as a PNG: its images with labels and answers, usage, write weights, read
    weights (all heads, and each), and the memory after one step.

    Args:
        episode: see `inspection.trace_episode`.
        path: of the file.
        step: which memory is drawn, and marked in the other maps; None: the last.
        slots: their order; above 256 slots, several share a row.

    Returns:
        ``path``, or None, with a message, where matplotlib is missing.

    Raises:
        ValueError: there is no such step.
        OSError: the file cannot be written.
    """
    from mann_ext.inspection import SlotRows

    steps, trace = episode.steps, episode.trace
    if step is not None and not 0 <= step < steps:
        raise ValueError(f"draw_episode: expected step from 0 to {steps - 1}, got {step}")
    heads = trace.gates.shape[-1]
    images, maps = 0.62 * -(-steps // IMAGES_A_ROW) + 0.5, 2 + -(-heads // 2)
    figure = _figure(12, images + 3 * maps)
    if figure is None:
        return None
    figure.suptitle(f"{episode.title}: {sum(episode.right)} of {steps} right", fontsize=11)
    grid = figure.add_gridspec(1 + maps, 2, height_ratios=(images, *[3] * maps))
    draw_images(figure.add_subplot(grid[0, :]), episode)
    rows = SlotRows(trace, slots)
    reads = rows.weights(trace.read_weights)
    panels: list[tuple[str, Tensor, float | None]] = [
        ("Usage", rows.weights(trace.usage), None),
        ("Write weights, sum of heads", rows.weights(trace.write_weights.sum(1)), None),
        ("Read weights, sum of heads", rows.weights(trace.read_weights.sum(1)), None),
    ]
    high = float(reads.max())
    panels += [(f"Read weights, head {head}", reads[:, head], high) for head in range(heads)]
    for number, (title, values, largest) in enumerate(panels):
        place = number + (number > 2)  # the memory's comes after the first three
        axes = figure.add_subplot(grid[1 + place // 2, place % 2])
        draw_slots(axes, values, rows, title, largest)
        if step is not None:
            axes.axvline(step, color="white", linestyle="--", linewidth=1.0)
    at = steps - 1 if step is None else step
    draw_memory(figure.add_subplot(grid[2, 1]), trace.memory[at].float(), rows, at)
    return save(figure, path)


def draw_images(axes: Axes, episode: TracedEpisode) -> None:
    """The images in order, each with its true label, ✓ or ✗, and the answer where it is wrong."""
    gap = 1.5
    answers = all(len(answer) < 3 for answer in episode.predictions)  # else no room
    tops = []
    for t, image in enumerate(episode.images.numpy()):
        row, column = divmod(t, IMAGES_A_ROW)
        left, top = column * 1.15, row * gap
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, extent=(left, left + 1, top + 1, top))
        label, answer = episode.labels[t], episode.predictions[t]
        text, colour = (f"{label} ✓", "#1a7f37") if label == answer else (f"{label} ✗", "#b3261e")
        if label != answer and answers:
            text += answer
        size = 7 if answers else 5
        axes.text(left + 0.5, top + 1.25, text, size=size, color=colour, ha="center", va="center")
        tops.append(top)
    columns = min(episode.steps, IMAGES_A_ROW)
    axes.set(xlim=(-0.1, columns * 1.15), ylim=(max(tops) + gap, -0.1), aspect="equal")
    axes.axis("off")
    axes.set_title(
        "Images in order, each with its label: ✓ right, ✗ wrong" + ", and the answer" * answers,
        fontsize=9,
    )


def draw_slots(
    axes: Axes, values: Tensor, rows: SlotRows, title: str, largest: float | None = None
) -> None:
    """A heat map of (T, rows), steps to the right and slots down."""
    picture = axes.imshow(
        values.T.numpy(), cmap="viridis", vmin=0, vmax=largest or float(values.max()) or 1.0,
        extent=(-0.5, len(values) - 0.5, rows.count * rows.size - 0.5, -0.5),
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.set(xlabel="step", ylabel=_slot_label(rows))
    axes.set_title(title, fontsize=10)
    axes.figure.colorbar(picture, ax=axes, pad=0.01)


def draw_memory(axes: Axes, memory: Tensor, rows: SlotRows, step: int) -> None:
    """A heat map of the memory (N, W) after ``step``."""
    values = rows.memory(memory)
    bound = float(values.abs().max()) or 1.0
    picture = axes.imshow(
        values.numpy(), cmap="RdBu_r", vmin=-bound, vmax=bound,
        extent=(-0.5, values.shape[1] - 0.5, rows.count * rows.size - 0.5, -0.5),
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    axes.set(xlabel="column", ylabel=_slot_label(rows))
    axes.set_title(f"Memory after step {step}", fontsize=10)
    axes.figure.colorbar(picture, ax=axes, pad=0.01)


def _slot_label(rows: SlotRows) -> str:
    return rows.label + (f"; {rows.size} a row" if rows.size > 1 else "")


def _results(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return results


def _paper(results: dict[str, Any]) -> dict[str, float]:
    """The paper's accuracies of the model that was trained."""
    values: dict[str, float] = results.get("paper", {}).get(results.get("paper_name"), {})
    return values
