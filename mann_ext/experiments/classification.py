"""Tables 1 and 2 of Santoro et al. (2016): accuracy by instance, ours beside the paper's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mann_ext import evaluation, training
from mann_ext.experiments import nearest_neighbours
from mann_ext.experiments.reproduction import Reproduction, Results, Run
from mann_ext.experiments.santoro import (
    INSTANCES,
    PAPER_ACCURACY,
    PAPER_INSTANCES,
    SantoroConfig,
)
from mann_ext.experiments.santoro_reproductions import NeighbourConfig
from mann_ext.reporting import Table, ordinal, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Setting = tuple[str, int]
"""Kind of label and classes an episode: a key of PAPER_ACCURACY."""

CURVE_POINTS = 40
"""At most so many points of a learning curve are kept."""


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy on held-out classes; under "moved" with their images shifted and turned a little
    too, as those for training are."""
    if isinstance(config, NeighbourConfig):
        return nearest_neighbours.measure(config, episodes)
    assert trained is not None
    values = accuracy_of(trained, config, episodes)
    changed = replace(config, episodes=replace(config.episodes, augment_test=True))
    moved = accuracy_of(trained, changed, episodes)
    kept = ("accuracy", "half_width_95", "episodes")
    return {
        **values,
        "moved": {name: moved[name] for name in kept},
        "curve": learning_curve(trained),
    }


def learning_curve(run_dir: Path) -> dict[str, Any]:
    """Accuracy on held-out classes during a run: ``episodes`` (P,), how many it had been trained
    on, and ``accuracy``, (P,) for each of PAPER_INSTANCES that its episodes show."""
    points = [record for record in read_metrics(run_dir) if record["kind"] == "eval"]
    every = max(1, math.ceil(len(points) / CURVE_POINTS))
    points = points[::-1][::every][::-1]  # the last one stays
    shown = [
        number
        for number in map(str, PAPER_INSTANCES)
        if all(number in point["accuracy"] for point in points)
    ]
    return {
        "episodes": [point["episodes"] for point in points],
        "accuracy": {
            number: [round(point["accuracy"][number], 4) for point in points] for number in shown
        },
    }


def accuracy_of(trained: Path, config: SantoroConfig, episodes: int) -> dict[str, Any]:
    """Accuracy of a trained model on the held-out episodes that ``config`` describes."""
    task, model, preset, progress = training.load_run(trained, config)
    return evaluation.results(
        task, model, episodes, preset=preset, step=progress.step, training_seconds=progress.seconds
    )


def tables(reproduction: Reproduction, results: Results) -> list[Table]:
    """A table for each setting: the paper's rows, and ours below each."""
    found = []
    for setting, runs in by_setting(reproduction.runs).items():
        rows: list[tuple[str, ...]] = []
        for name, values in PAPER_ACCURACY.get(setting, {}).items():
            paper = dict(zip(map(str, PAPER_INSTANCES), values, strict=True))
            rows.append((f"{name}, paper", *cells(paper, ".1f"), ""))
            rows += _own_rows([run for run in runs if run.label == name], results)
        known = PAPER_ACCURACY.get(setting, {})
        rows += _own_rows([run for run in runs if run.label not in known], results)
        columns = ("", *(ordinal(number) for number in range(1, INSTANCES + 1)), "measured after")
        found.append(Table(f"{_words(setting)}, accuracy (%) by instance", columns, tuple(rows)))
    return found


def _own_rows(runs: Iterable[Run], results: Results) -> list[tuple[str, ...]]:
    rows = []
    for run in runs:
        if run.name not in results:
            continue
        own = results[run.name]
        for words, several, _ in _variants(own):
            means, widths = evaluation.across_seeds(several)
            notes = ("", "") if words else (effort(own), sample(own))
            rows.append((f"{run.label}, ours{words}", *cells(means, ".1f", 100), notes[0]))
            rows.append(("  95 % interval", *cells(widths, "±.1f", 100), notes[1]))
    return rows


def figures(reproduction: Reproduction, results: Results) -> dict[str, Figure]:
    """Accuracy by instance, and the learning curves of the runs that have one."""
    found = {"": _by_instance(reproduction, results)}
    curves = [
        (setting, run.label, own["curve"])
        for setting, runs in by_setting(reproduction.runs).items()
        for run in runs
        for own in results.get(run.name, ())[:1]
        if own.get("curve", {}).get("episodes")
    ]
    if curves:
        found["learning"] = _learning(curves)
    return found


def _learning(curves: Sequence[tuple[Setting, str, Mapping[str, Any]]]) -> Figure:
    """Figure 2 of the paper: held-out accuracy at some instances by episodes of training, a panel
    for each model; one colour is one instance in all of them."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    columns = min(3, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    colours = colormaps["viridis"]
    for (setting, label, curve), axes in zip(curves, panels, strict=False):
        thousands = [episodes / 1000 for episodes in curve["episodes"]]
        for number, accuracy in curve["accuracy"].items():
            axes.plot(
                thousands, [100 * value for value in accuracy], linewidth=1.2,
                color=colours(0.1 * (int(number) - 1)), label=ordinal(int(number)),
            )  # fmt: skip
        axes.set_title(f"{label.replace('`', '')}, {_words(setting)}", fontsize=9)
        axes.set(xlabel="thousand episodes of training", ylim=(-1, 101), xlim=(0, None))
        axes.grid(alpha=0.25)
    for axes in panels:
        axes.set_visible(False)
    shown = figure.axes[: len(curves)]
    for axes in shown[::columns]:
        axes.set_ylabel("accuracy (%)")
    shown[0].legend(fontsize=7, ncols=2, title="instance", title_fontsize=7)
    return figure


def _by_instance(reproduction: Reproduction, results: Results) -> Figure:
    """Accuracy by instance in each setting: ours solid, or dotted with images moved, with 95 %
    intervals; the paper's dashed."""
    from matplotlib.figure import Figure

    settings = by_setting(reproduction.runs)
    figure = Figure(figsize=(6.5 * len(settings), 5.5), layout="constrained", dpi=110)
    for axes, (setting, runs) in zip(
        figure.subplots(1, len(settings), squeeze=False)[0], settings.items(), strict=True
    ):
        paper = PAPER_ACCURACY.get(setting, {})
        labels = list(dict.fromkeys([*paper, *(run.label for run in runs)]))
        for number, label in enumerate(labels):
            colour = f"C{number}"
            if label in paper:
                axes.plot(
                    PAPER_INSTANCES, paper[label], color=colour, linestyle="--", alpha=0.7,
                    label=f"{label}, paper",
                )  # fmt: skip
            for run in runs:
                if run.label != label or run.name not in results:
                    continue
                name = f"{label}, ours".replace("`", "")
                for words, own, line in _variants(results[run.name]):
                    means, widths = evaluation.across_seeds(own)
                    axes.errorbar(
                        [int(instance) for instance in means],
                        [100 * value for value in means.values()],
                        yerr=[100 * widths[instance] for instance in means],
                        color=colour, linestyle=line, marker="o", markersize=3, capsize=2,
                        label=name + words,
                    )  # fmt: skip
        axes.set(
            xlabel="instance", ylabel="accuracy (%)", ylim=(-1, 101),
            xticks=range(1, INSTANCES + 1), title=_words(setting),
        )  # fmt: skip
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:  # nothing is drawn before the first run is done
            axes.legend(
                fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False
            )
    return figure


def _variants(own: Sequence[dict[str, Any]]) -> list[tuple[str, Sequence[dict[str, Any]], str]]:
    """What was measured of a run: words for it, results, and the style of its line."""
    found: list[tuple[str, Sequence[dict[str, Any]], str]] = [("", own, "-")]
    if all("moved" in result for result in own):
        found.append((", images moved", [result["moved"] for result in own], ":"))
    return found


def compact(results: Mapping[str, Results], reproductions: Iterable[Reproduction]) -> str:
    """One Markdown table of what was measured in several reproductions: the paper's accuracy and
    ours in each cell.

    Args:
        results: of each reproduction, by its name.
        reproductions: those whose rows are listed.
    """
    header = ("classes", "labels", "model", *(ordinal(number) for number in PAPER_INSTANCES))
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    widest = 0.0
    for reproduction in reproductions:
        own = results[reproduction.name]
        for (labels, ways), runs in by_setting(reproduction.runs).items():
            for run in runs:
                if run.name not in own:
                    continue
                paper = PAPER_ACCURACY.get((labels, ways), {}).get(run.label, ())
                measured = [
                    evaluation.across_seeds(each) for _, each, _ in _variants(own[run.name])
                ]
                widest = max([widest, *(max(widths.values()) for _, widths in measured)])
                texts = []
                for number in map(str, PAPER_INSTANCES):
                    values = [f"{100 * means[number]:.1f}" for means, _ in measured]
                    texts.append(" ".join([values[0], *(f"({value})" for value in values[1:])]))
                if paper:
                    texts = [f"{a:.1f} / {b}" for a, b in zip(paper, texts, strict=True)]
                row = (str(ways), labels.replace("_", "-"), run.label, *texts)
                lines.append("| " + " | ".join(row) + " |")
    note = (
        "Paper / ours, percent correct on held-out classes; in brackets, ours with the held-out\n"
        "images shifted and turned a little, as those for training are. 95 % intervals of ours\n"
        f"are within ±{math.ceil(1000 * widest) / 10:.1f}."
    )
    return "\n".join([*lines, "", note])


def by_setting(runs: Iterable[Run]) -> dict[Setting, list[Run]]:
    """Runs that belong in one table."""
    found: dict[Setting, list[Run]] = {}
    for run in runs:
        episodes = run.config.episodes
        found.setdefault((episodes.labels, episodes.test_ways), []).append(run)
    return found


def cells(values: Mapping[str, float], form: str, scale: float = 1.0) -> list[str]:
    """Numbers by instance as text, empty where there is none; a form may begin with ±."""
    sign = "±" * form.startswith("±")
    numbers = {name: f"{sign}{scale * value:{form.lstrip('±')}}" for name, value in values.items()}
    return [numbers.get(str(number), "") for number in range(1, INSTANCES + 1)]


def effort(results: Sequence[Mapping[str, Any]]) -> str:
    """How long the models were trained, such as ``4,000 minibatches, 1.5 min``."""
    if "minibatches" not in results[0]:
        return "no training"
    steps, seconds = (
        sum(result[name] for result in results) / len(results)
        for name in ("minibatches", "training_seconds")
    )
    return f"{steps:,.0f} minibatches, {seconds / 60:.1f} min"


def sample(results: Sequence[Mapping[str, Any]]) -> str:
    """What an interval is over."""
    if len(results) > 1:
        return f"over {len(results)} seeds"
    return f"over {results[0]['episodes']:,} episodes, seed {results[0]['seed']}"


def _words(setting: Setting) -> str:
    labels, ways = setting
    return f"{ways} classes, {labels.replace('_', '-')} labels"
