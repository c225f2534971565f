"""Figure 4 of Santoro et al. (2016): a model trained on up to 25 classes meets up to 100."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mann_ext import evaluation, training
from mann_ext.experiments.classification import cells, effort
from mann_ext.experiments.reproduction import Reproduction, Results, Run
from mann_ext.experiments.santoro import INSTANCES
from mann_ext.reporting import Table, ordinal

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TEST_WAYS = (15, 25, 50, 75, 100)
"""Classes an episode, in episodes of ten times as many steps."""
TEST_SLOTS = (1, 4)
"""Memory slots, as multiples of those trained with: no parameter depends on their number."""


def measure(run: Run, config: Any, trained: Path | None, episodes: int) -> dict[str, Any]:
    """Accuracy by instance for each number of classes and of memory slots."""
    assert trained is not None
    started = time.perf_counter()
    tests = []
    for ways in TEST_WAYS:
        for factor in TEST_SLOTS:
            changed = replace(
                config,
                model=replace(config.model, num_slots=factor * config.model.num_slots),
                episodes=replace(config.episodes, ways=ways, grow_every=0, ways_most=None),
            )
            task, model, preset, progress = training.load_run(trained, changed)
            found = evaluation.results(
                task, model, episodes, preset=preset, step=progress.step,
                training_seconds=progress.seconds,
            )  # fmt: skip
            kept = ("accuracy", "half_width_95", "episodes")
            sizes = {"ways": ways, "num_slots": changed.model.num_slots}
            tests.append({**sizes, **{name: found[name] for name in kept}})
    return {
        "tests": tests,
        "episodes": min(test["episodes"] for test in tests),
        "data": found["data"],
        "preset": preset,
        "minibatches": found["minibatches"],
        "training_seconds": found["training_seconds"],
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        **evaluation.provenance(config),
    }


def tables(reproduction: Reproduction, results: Results) -> list[Table]:
    """A table for each run: accuracy by instance, by classes and slots."""
    found = []
    for run in reproduction.runs:
        own = results.get(run.name, ())
        if not own:
            continue
        rows: list[tuple[str, ...]] = []
        for number, test in enumerate(own[0]["tests"]):
            means, widths = evaluation.across_seeds([result["tests"][number] for result in own])
            name = f"{test['ways']} classes, {test['num_slots']} slots"
            rows.append((name, *cells(means, ".1f", 100)))
            rows.append(("  95 % interval", *cells(widths, "±.1f", 100)))
        columns = ("", *(ordinal(number) for number in range(1, INSTANCES + 1)))
        title = f"{run.label}: accuracy (%) by instance, after {effort(own)}"
        found.append(Table(title, columns, tuple(rows)))
    return found


def figures(reproduction: Reproduction, results: Results) -> dict[str, Figure]:
    """Accuracy by instance: a colour for each number of classes, dashed with more slots."""
    from matplotlib.figure import Figure

    runs = [run for run in reproduction.runs if run.name in results]
    if not runs:
        return {}
    figure = Figure(figsize=(7 * len(runs), 5.5), layout="constrained", dpi=110)
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        own = results[run.name]
        tests = own[0]["tests"]
        ways = sorted({test["ways"] for test in tests})
        slots = sorted({test["num_slots"] for test in tests})
        for number, test in enumerate(tests):
            means, widths = evaluation.across_seeds([result["tests"][number] for result in own])
            axes.errorbar(
                [int(instance) for instance in means],
                [100 * value for value in means.values()],
                yerr=[100 * widths[instance] for instance in means],
                color=f"C{ways.index(test['ways'])}", capsize=2, marker="o", markersize=4,
                linestyle=("-", "--", ":", "-.")[slots.index(test["num_slots"]) % 4],
                label=f"{test['ways']} classes, {test['num_slots']} slots",
            )  # fmt: skip
        axes.set(
            xlabel="instance", ylabel="accuracy (%)", ylim=(-1, 101),
            xticks=range(1, INSTANCES + 1), title=run.label,
        )  # fmt: skip
        axes.grid(alpha=0.25)
        axes.legend(
            fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.11), ncols=2, frameon=False
        )
    return {"": figure}
