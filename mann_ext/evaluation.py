"""The result of a run: held-out accuracy with confidence intervals, beside the paper's."""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mann_ext import __version__
from mann_ext.checkpoint import replace_file
from mann_ext.experiments.config import to_json
from mann_ext.experiments.few_shot import Accuracy
from mann_ext.experiments.santoro import (
    INSTANCES,
    PAPER_INSTANCES,
    SantoroConfig,
    paper_name,
    paper_rows,
)
from mann_ext.reporting import ordinal

WIDE = 110
"""Columns of a terminal that the accuracies of all instances fit in."""


def results(
    accuracy: Accuracy,
    config: SantoroConfig,
    *,
    preset: str,
    data: str,
    step: int,
    training_seconds: float,
    evaluation_seconds: float,
    processes: int = 1,
) -> dict[str, Any]:
    """Everything that says what was measured, of what, and how, ready for JSON."""
    return {
        **accuracy.summary(),
        "paper": {
            name: dict(
                zip(map(str, PAPER_INSTANCES), (value / 100 for value in values), strict=True)
            )
            for name, values in paper_rows(config).items()
        },
        "paper_name": paper_name(config.model),
        "data": data,
        "minibatches": step,
        "training_episodes": step * config.episodes.batch_size * processes,
        "training_seconds": round(training_seconds, 1),
        "evaluation_seconds": round(evaluation_seconds, 1),
        "preset": preset,
        "processes": processes,
        **provenance(config),
    }


def provenance(config: Any) -> dict[str, Any]:
    """With what, where and when something was measured; ``config`` has a ``run``."""
    return {
        "config": to_json(config),
        "seed": config.run.seed,
        "threads": torch.get_num_threads(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "version": __version__,
        "torch": torch.__version__,
        "machine": machine(torch.device(config.run.device)),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def across_seeds(
    results: Sequence[Mapping[str, Any]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean accuracy by instance, and half of its 95 % confidence interval.

    Of one result, the interval is its own, over episodes; of several, it is over them, from
    Student's t distribution with one degree of freedom less than there are results.
    """
    if len(results) == 1:
        return dict(results[0]["accuracy"]), dict(results[0]["half_width_95"])
    means, half_widths = {}, {}
    for instance in results[0]["accuracy"]:
        values = [r["accuracy"][instance] for r in results if instance in r["accuracy"]]
        if len(values) < len(results):  # some episodes never showed a class so often
            continue
        spread = statistics.stdev(values) / math.sqrt(len(values))
        means[instance] = statistics.fmean(values)
        half_widths[instance] = t_quantile(len(values) - 1) * spread
    return means, half_widths


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t distribution; beyond 9 degrees of freedom from its expansion
    around the normal one, to 1e-3."""
    exact = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
    if freedom <= len(exact):
        return exact[freedom - 1]
    z, n = 1.959964, freedom
    first = (z**3 + z) / (4 * n)
    second = (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2)
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return z + first + second + third


def publish(values: Mapping[str, Any], config: SantoroConfig, path: Path | None) -> None:
    """Write results as JSON, whole or not at all, and print the table, whichever of them fails."""
    try:
        if path:
            replace_file(path, (json.dumps(values, indent=1) + "\n").encode())
    finally:
        print_table(values, config)


def machine(device: torch.device) -> str:
    """The class of machine, such as ``2 cores, AVX-512``."""
    cores = f"{usable_cpus()} cores, {_instruction_set()}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}; {cores}"
    return cores


def usable_cpus() -> int:
    """CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


def _instruction_set() -> str:
    try:
        from mann_ext import _C

        name = str(_C.cpu_instruction_set())
    except (ImportError, AttributeError, ValueError):
        return "instruction set unknown"
    return {"avx512": "AVX-512", "avx2": "AVX2"}.get(name, name)


def print_table(values: Mapping[str, Any], config: SantoroConfig) -> None:
    """Print the accuracies by instance beside the paper's."""
    own = paper_name(config.model)
    labels = config.episodes.labels.replace("_", "-")
    title = (
        f"Accuracy (%) by instance, {values['episodes']:,} episodes of held-out classes, "
        f"{own} after {values['minibatches']:,} minibatches\n"
        f"{config.episodes.test_ways} classes an episode, {labels} labels, "
        f"{values['data']}"
    )
    paper = {name: row for name, row in values["paper"].items() if name == own}
    paper |= {name: row for name, row in values["paper"].items() if name != own}
    shares = {"this run": values["accuracy"]}
    shares |= {f"paper, {name}": row for name, row in paper.items()}
    rows = {name: {k: f"{100 * v:.1f}" for k, v in row.items()} for name, row in shares.items()}
    widths = {k: f"±{100 * v:.1f}" for k, v in values["half_width_95"].items()}
    rows = {"this run": rows.pop("this run"), "  95 % interval": widths, **rows}
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(title)
        columns = range(1, INSTANCES + 1)
        print(" " * 28 + "".join(f"{ordinal(number):>7}" for number in columns))
        for name, row in rows.items():
            print(f"{name:<28}" + "".join(f"{row.get(str(number), ''):>7}" for number in columns))
        return
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to fit
        console = Console(width=WIDE)
    print(title)
    table = Table()
    table.add_column("", no_wrap=True)
    shown = range(1, INSTANCES + 1) if console.width >= WIDE else PAPER_INSTANCES
    for number in shown:
        table.add_column(ordinal(number), justify="right", no_wrap=True)
    for name, row in rows.items():
        table.add_row(name, *(row.get(str(number), "") for number in shown))
    console.print(table)
