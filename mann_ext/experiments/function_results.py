"""Tables and figures of how models learn functions: their errors by the number of points seen.

`measure`, `tables` and `figures` are what reproducing a published result takes, for the regression
of Santoro et al. (2016) and the quadratic functions of Hochreiter et al. (2001).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mann_ext import evaluation, training
from mann_ext.reporting import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LISTED = (0, 1, 2, 5, 10, 20, 50)
"""Points seen, in tables, and as many as there are."""
NAMES = {"nll": "negative log-likelihood", "mse": "mean squared error"}
FORMATS = {"nll": ".3f", "mse": ".2g"}
DRAWN_BELOW = 0.1
"""Where errors are on a logarithmic axis, it reaches down to this share of the smallest of ours."""

Results = Mapping[str, Any]
"""What ``results.json`` holds."""


def measure(run: Any, config: Any, trained: Path, episodes: int) -> dict[str, Any]:
    """Evaluate a trained model on held-out functions.

    Args:
        run: not needed.
        config: of the model and the functions.
        trained: folder of the trained model.
        episodes: least number of functions.
    """
    task, model, preset, progress = training.load_run(trained, config)
    return evaluation.results(
        task, model, episodes, preset=preset, step=progress.step, training_seconds=progress.seconds
    )


def tables(reproduction: Any, results: Mapping[str, Sequence[Results]]) -> list[Table]:
    """A table for each kind of function: the runs' errors beside the baselines'.

    Args:
        reproduction: its ``runs`` have a name and a label.
        results: what was measured of each run, by its name, one entry a seed.
    """
    return [table(runs) for runs in _by_data(reproduction, results)]


def figures(reproduction: Any, results: Mapping[str, Sequence[Results]]) -> dict[str, Figure]:
    """The same as curves, and an example where there is one."""
    from matplotlib.figure import Figure

    kinds = _by_data(reproduction, results)
    curves = Figure(figsize=(5.5 * len(kinds), 4.8), layout="constrained", dpi=110)
    for axes, runs in zip(curves.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        draw_errors(axes, runs)
    found = {"": curves}
    for runs in kinds:
        for label, run in runs.items():
            if "example" in run and "example" not in found:
                found["example"] = Figure(figsize=(11, 4.2), layout="constrained", dpi=110)
                draw_example(found["example"].subplots(1, 2, sharey=True), run["example"], label)
    return found


def run_figure(results: Results) -> Figure:
    """The errors of one run, and its example where there is one."""
    from matplotlib.figure import Figure

    example = results.get("example")
    panels = 3 if example else 1
    figure = Figure(figsize=(5.5 * panels, 4.8), layout="constrained", dpi=110)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    draw_errors(axes[0], {"this run": results})
    if example:
        draw_example(axes[1:], example, "this run")
        axes[2].sharey(axes[1])
    return figure


def table(runs: Mapping[str, Results]) -> Table:
    """Errors by the number of points seen, with 95 % intervals: of runs on the same functions, by
    their labels, and of the baselines; the runs' excess over the first, the best of them."""
    first = next(iter(runs.values()))
    metric = first["metric"]
    form, last = FORMATS[metric], len(first[metric]) - 1
    listed = [*(str(number) for number in LISTED if number < last), str(last)]
    rows = []

    def add(name: str, values: Results, half_widths: Results, mean: Results) -> None:
        rows.append((name, *(f"{values[n]:{form}}" for n in listed), f"{mean['value']:{form}}"))
        width = mean["half_width_95"]
        if width is not None:
            rows.append(("  ±", *(f"{half_widths[n]:{form}}" for n in listed), f"{width:{form}}"))

    for label, run in runs.items():
        add(label, run[metric], run["half_width_95"], run["mean"])
        best = next(iter(run["baselines"].values()))
        add(
            "  excess",
            best["difference"],
            best["difference_half_width_95"],
            best["mean_difference"],
        )
    for name, baseline in first["baselines"].items():
        add(name, baseline[metric], baseline["half_width_95"], baseline["mean"])
    efforts = ", ".join(f"{label} after {run['minibatches']:,}" for label, run in runs.items())
    title = (
        f"{NAMES[metric].capitalize()} by points seen before, {first['episodes']:,} never-seen "
        f"functions, ± half of the 95 % interval\n{first['data']}; {efforts} minibatches; excess "
        f"over {next(iter(first['baselines']))}"
    )
    shown = [0, *range(1, len(listed), 2), len(listed) + 1]
    return Table(title, ("points seen", *listed, "mean"), tuple(rows), narrow=tuple(shown))


def draw_errors(axes: Axes, runs: Mapping[str, Results]) -> None:
    """Mean error against points seen, with 95 % intervals: runs solid, baselines dashed."""
    first = next(iter(runs.values()))
    metric = first["metric"]
    curves = [(label, run, "-") for label, run in runs.items()]
    curves += [(name, baseline, "--") for name, baseline in first["baselines"].items()]
    for label, entry, style in curves:
        seen = [int(number) for number in entry[metric]]
        means = list(entry[metric].values())
        (line,) = axes.plot(seen, means, style, linewidth=1.6, label=label)
        if entry["half_width_95"]:
            widths = entry["half_width_95"].values()
            low, high = (
                [mean + sign * width for mean, width in zip(means, widths, strict=True)]
                for sign in (-1, 1)
            )
            axes.fill_between(seen, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if metric == "mse":
        lowest = min(min(run[metric].values()) for run in runs.values())
        axes.set(yscale="log")
        axes.set_ylim(bottom=DRAWN_BELOW * lowest)
    axes.set(xlabel="points seen before", ylabel=NAMES[metric])
    axes.set_title(first["data"], fontsize=9)
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False)


def draw_example(panels: Iterable[Axes], example: Results, label: str) -> None:
    """Predicted mean and two standard deviations after the points shown: the model on the left,
    the exact Gaussian process on the right."""
    for axes, (name, curve) in zip(panels, example["predictions"].items(), strict=True):
        low, high = (
            [
                mean + sign * 2 * deviation
                for mean, deviation in zip(curve["mean"], curve["standard_deviation"], strict=True)
            ]
            for sign in (-1, 1)
        )
        axes.fill_between(example["at"], low, high, alpha=0.25, linewidth=0, label="± 2 sd")
        axes.plot(example["at"], curve["mean"], linewidth=1.6, label="mean")
        axes.plot(example["x"], example["y"], "k.", markersize=7, label="points shown")
        title = label if name == "model" else name
        axes.set_title(f"{title} after {len(example['x'])} points", fontsize=10)
        axes.set(xlabel="x", ylabel="y")
        axes.grid(alpha=0.25)
        axes.legend(fontsize=8, frameon=False)


def _by_data(
    reproduction: Any, results: Mapping[str, Sequence[Results]]
) -> list[dict[str, Results]]:
    """Results by label, those of the same functions together; with its seed where there are
    several."""
    found: dict[str, dict[str, Results]] = {}
    for run in reproduction.runs:
        measured = results.get(run.name, ())
        for one in measured:
            label = run.label if len(measured) == 1 else f"{run.label}, seed {one['seed']}"
            found.setdefault(one["data"], {})[label] = one
    return list(found.values())
