"""The results of a run: what was measured on held-out episodes, of what, and how."""

from __future__ import annotations

import datetime
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mann_ext import __version__
from mann_ext.checkpoint import replace_file
from mann_ext.experiments.config import to_json
from mann_ext.experiments.task import Task
from mann_ext.reporting import Table, print_table


def results(
    task: Task,
    model: nn.Module,
    episodes: int,
    *,
    preset: str,
    step: int,
    training_seconds: float,
    processes: int = 1,
) -> dict[str, Any]:
    """Evaluate a model on at least so many held-out episodes; returns everything that says what was
    measured, of what, and how, ready for JSON."""
    config = task.config
    started = time.perf_counter()
    count, metrics = task.evaluate(model, episodes)
    return {
        **metrics,
        "episodes": count,
        **task.details(model),
        "data": task.data_name,
        "minibatches": step,
        "training_episodes": step * config.episodes.batch_size * processes,
        "training_seconds": round(training_seconds, 1),
        "evaluation_seconds": round(time.perf_counter() - started, 1),
        "preset": preset,
        "experiment": config.name,
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


def publish(values: Mapping[str, Any], table: Table, path: Path | None) -> None:
    """Write results as JSON, whole or not at all, and print the table, whichever of them fails."""
    try:
        if path:
            replace_file(path, (json.dumps(values, indent=1) + "\n").encode())
    finally:
        print_table(table)


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
