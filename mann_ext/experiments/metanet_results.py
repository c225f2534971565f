"""Tables of Munkhdalai & Yu (2017): accuracy of whole tasks, ours beside the paper's."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mann_ext import data, evaluation, training
from mann_ext.data import Tasks
from mann_ext.experiments.classification import effort, sample
from mann_ext.experiments.metanet_reproductions import PAPER
from mann_ext.experiments.reproduction import Reproduction, Results, Run
from mann_ext.experiments.support_query import SupportQueryConfig
from mann_ext.experiments.support_query_task import IMAGE_SIZE, SupportQuery, summary
from mann_ext.reporting import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Shares = dict[str, Tensor]
"""The share of right answers in each task, (tasks,), by what was tested: the columns of a table."""

ONE_SHOT_WAYS = 20


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy on held-out tasks; with 20 classes of the evaluation set, also Lake's 20 runs."""
    tasks = config.episodes
    lake = tasks.split == "background" and tasks.ways == ONE_SHOT_WAYS
    lake &= tasks.source != "synthetic"
    found: dict[str, Any] = {}

    def test(task: SupportQuery, model: nn.Module) -> Shares:
        if lake:
            found.update(one_shot_runs=summary({"runs": task.accuracies(model, lake_runs(config))}))
        return {str(tasks.ways): task.accuracies(model, task.held_out_tasks(episodes))}

    return {**measured(config, trained, episodes, test), **found}


def measured(
    config: SupportQueryConfig,
    trained: Path | None,
    episodes: int,
    test: Callable[[SupportQuery, nn.Module], Shares],
) -> dict[str, Any]:
    """What ``test`` finds of the trained model, or of one that needs no training, with all that
    says what was measured, ready for JSON."""
    origin: dict[str, Any] = {}
    if trained is None:
        task = SupportQuery(config, torch.device(config.run.device))
        model = task.model()
    else:
        trained_task, model, preset, progress = training.load_run(trained, config)
        assert isinstance(trained_task, SupportQuery)
        task = trained_task
        origin = {
            "preset": preset,
            "minibatches": progress.step,
            "training_seconds": round(progress.seconds, 1),
        }
    started = time.perf_counter()
    return {
        **summary(test(task, model)),
        "episodes": episodes,
        "data": task.data_name,
        **origin,
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        **evaluation.provenance(config),
    }


def lake_runs(config: SupportQueryConfig) -> Iterable[Tasks]:
    """The 20 runs as tasks, one a batch."""
    runs = data.one_shot_runs(config.episodes.data_root)
    device = torch.device(config.run.device)
    label = torch.arange(ONE_SHOT_WAYS, device=device).unsqueeze(0)
    for shown, asked, same in zip(*runs, strict=True):
        support, queries = (
            (data.shrink(images, IMAGE_SIZE).to(device).float() / 255)[None, :, None]
            for images in (shown, asked)
        )
        yield Tasks(support, label, queries, same.to(device).unsqueeze(0))


def tables(reproduction: Reproduction, results: Results) -> list[Table]:
    """Accuracy: a row for each learner, the paper's above ours. For Lake's runs, also the error."""
    paper = PAPER.get(reproduction.name, {})
    columns = _columns(reproduction, results)
    rows: list[tuple[str, ...]] = []
    for label, runs in _by_label(reproduction, results).items():
        if label in paper:
            rows.append((f"{label}, paper", *cells(paper[label], columns, ".2f"), ""))
        means, widths, notes = ours(runs, results)
        if means:
            rows.append((f"{label}, ours", *cells(means, columns, ".2f", 100), notes[0]))
            rows.append(("  95 % interval", *cells(widths, columns, "±.2f", 100), notes[1]))
    names = tuple(column_name(column) for column in columns)
    title = "Accuracy (%) on held-out tasks"
    found = [Table(title, ("", *names, "measured after"), tuple(rows))]
    return [*found, *_lake_table(reproduction, results)]


def _lake_table(reproduction: Reproduction, results: Results) -> list[Table]:
    """Errors on Lake's 20 runs, where they were measured: the paper's 20-way figures, and ours."""
    paper, rows, found = PAPER.get(reproduction.name, {}), [], False
    for label, runs in _by_label(reproduction, results).items():
        known = paper.get(label, {}).get(str(ONE_SHOT_WAYS))
        own, width = "", ""
        for run in runs:
            several = [each["one_shot_runs"] for each in results[run.name] if _has_lake(each)]
            if several:
                means, widths = evaluation.across_seeds(several)
                own, width = f"{100 - 100 * means['runs']:.1f}", f"±{100 * widths['runs']:.1f}"
                found = True
        rows.append((label, "" if known is None else f"{100 - known:.1f}", own, width))
    if not found:
        return []
    title = "Error (%) on the 20 runs of 20-way one-shot classification, 400 images"
    return [Table(title, ("", "paper", "ours", "95 % interval"), tuple(rows))]


def _has_lake(values: Mapping[str, Any]) -> bool:
    return "one_shot_runs" in values


def ours(
    runs: Iterable[Run], results: Results
) -> tuple[dict[str, float], dict[str, float], tuple[str, str]]:
    """Accuracies and half intervals by column of the runs that make a row, and notes on them."""
    means: dict[str, float] = {}
    widths: dict[str, float] = {}
    notes: tuple[dict[str, str], dict[str, str]] = ({}, {})
    for run in runs:
        several = results[run.name]
        found, intervals = evaluation.across_seeds(several)
        means |= found
        widths |= intervals
        trained = ", ".join(map(column_name, found))
        notes[0][trained], notes[1][trained] = effort(several), sample(several)
    efforts, samples = map(_joined, notes)
    return means, widths, (efforts, samples)


def _joined(notes: Mapping[str, str]) -> str:
    """What holds of all columns, or of each."""
    if len(set(notes.values())) <= 1:
        return next(iter(notes.values()), "")
    return "; ".join(f"{columns}: {note}" for columns, note in notes.items())


def _by_label(reproduction: Reproduction, results: Results) -> dict[str, list[Run]]:
    """The runs that were measured, by the row they belong in; the paper's rows without ours too,
    where there is anything of ours."""
    found: dict[str, list[Run]] = {label: [] for label in PAPER.get(reproduction.name, {})}
    for run in reproduction.runs:
        if run.name in results:
            found.setdefault(run.label, []).append(run)
    return found


def _columns(reproduction: Reproduction, results: Results) -> list[str]:
    """What was tested, by us or in the paper; numbers of classes in their order."""
    tested = [each["accuracy"] for several in results.values() for each in several]
    tested += PAPER.get(reproduction.name, {}).values()
    columns = dict.fromkeys(column for values in tested for column in values)
    return sorted(columns, key=lambda column: int(column) if column.isdecimal() else 0)


def column_name(column: str) -> str:
    """``5-way`` for the column 5; others have their names."""
    return f"{column}-way" if column.isdecimal() else column


def cells(
    values: Mapping[str, float], columns: Iterable[str], form: str, scale: float = 1.0
) -> list[str]:
    """Numbers as text, empty where there is none; a form may begin with ±."""
    sign = "±" * form.startswith("±")
    form = form.lstrip("±")
    return [f"{sign}{scale * values[c]:{form}}" if c in values else "" for c in columns]


def figures(reproduction: Reproduction, results: Results) -> dict[str, Figure]:
    """Accuracy against what was tested: ours solid with 95 % intervals, the paper's dashed."""
    from matplotlib.figure import Figure

    columns = _columns(reproduction, results)
    place = {column: number for number, column in enumerate(columns)}
    figure = Figure(figsize=(8, 5.5), layout="constrained", dpi=110)
    axes = figure.subplots()
    paper = PAPER.get(reproduction.name, {})
    for number, (label, runs) in enumerate(_by_label(reproduction, results).items()):
        known, (means, widths, _) = paper.get(label, {}), ours(runs, results)
        colour = f"C{number}"
        if known:
            axes.plot(
                [place[column] for column in known], list(known.values()), "s--", color=colour,
                markersize=4, alpha=0.7, label=f"{label}, paper",
            )  # fmt: skip
        if means:
            axes.errorbar(
                [place[column] for column in means],
                [100 * value for value in means.values()],
                yerr=[100 * widths.get(column, math.nan) for column in means],
                color=colour, marker="o", markersize=4, capsize=2, label=f"{label}, ours",
            )  # fmt: skip
    axes.set(ylabel="accuracy (%)", xticks=range(len(columns)))
    axes.set_xticklabels([column_name(column) for column in columns])
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    return {"": figure}


def compact(results: Results, reproduction: Reproduction) -> str:
    """One Markdown table of what was measured: the paper's accuracy and ours in each cell."""
    columns = _columns(reproduction, results)
    lines = ["| " + " | ".join(("model", *map(column_name, columns))) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    paper, widest = PAPER.get(reproduction.name, {}), 0.0
    for label, runs in _by_label(reproduction, results).items():
        means, widths, _ = ours(runs, results)
        if not means:
            continue
        widest = max([widest, *widths.values()])
        theirs = cells(paper.get(label, {}), columns, ".1f")
        own = cells(means, columns, ".1f", 100)
        texts = [
            f"{paper or '–'} / {found or '–'}" if paper or found else ""
            for paper, found in zip(theirs, own, strict=True)
        ]
        lines.append("| " + " | ".join((label, *texts)) + " |")
    note = (
        "Paper / ours, percent correct on tasks of held-out classes; – where one has no figure;\n"
        f"95 % intervals of ours are within ±{math.ceil(1000 * widest) / 10:.1f}."
    )
    return "\n".join([*lines, "", note])
