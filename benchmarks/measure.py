"""Timing side by side, bandwidth of this machine, peak memory of a subprocess, and the report."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import mann_ext


def side_by_side(
    contenders: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 2,
    turn_ms: float = 100.0,
    settle: bool = False,
) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds a call of each, run in turn so that drift hits all alike.

    A turn calls a contender until ``turn_ms`` have passed, at least once, and counts the mean of
    its calls: in a training loop, too, an operator finds its code and its buffers in the caches.
    With ``settle`` an untimed call comes before: hundreds of megabytes that one contender frees can
    be slow to come back to the next.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, run in contenders.items():
            if settle:
                run()
            start, calls, spent = time.perf_counter(), 0, 0.0
            while calls == 0 or spent < turn_ms:
                run()
                calls += 1
                spent = (time.perf_counter() - start) * 1e3
            if turn >= warmup:
                times[name].append(spent / calls)
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)}
        for name, t in times.items()
    }


def read_write_bandwidth(threads: int, mebibytes: int = 512) -> float:
    """Bytes read plus bytes written a second by an in-place scaling of a large array."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        array = torch.ones(mebibytes * 2**18)
        times = []
        for _ in range(7):
            start = time.perf_counter()
            array.mul_(1.0000001)
            times.append(time.perf_counter() - start)
        return 2 * array.numel() * array.element_size() / statistics.median(times[2:])
    finally:
        torch.set_num_threads(before)


def peak_memory(code: str) -> float:
    """Peak resident bytes that ``code`` adds in a fresh process with torch and mann_ext loaded."""
    return float(in_process(code)[-1])


def in_process(code: str, timeout: float = 900) -> list[str]:
    """The lines that ``code`` prints in such a process, and last the peak bytes it added."""
    program = (
        "import torch\n"
        "from benchmarks import workloads\n"
        "workloads.warm_up()\n"
        # Not getrusage: a child inherits its parent's maximum there.
        "def peak():\n"
        "    text = open('/proc/self/status').read()\n"
        "    return 1024 * int(text.split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        f"{code}\n"
        "print(peak() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout, check=True
    )
    return done.stdout.strip().splitlines()


def machine() -> dict[str, Any]:
    """What a reader needs to know of where this ran."""
    from mann_ext import info

    facts = info.info()
    return {
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "instruction_set": facts.get("cpu instruction set", "unknown"),
        "torch": torch.__version__,
        "mann_ext": mann_ext.__version__,
        "date": date.today().isoformat(),
    }


def write_json(path: Path, report: Mapping[str, Any]) -> None:
    """Write to a temporary name beside ``path``, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    for row in rows:
        table.add_row(*(f"{x:.3g}" if isinstance(x, float) else str(x) for x in row))
    Console().print(table)
