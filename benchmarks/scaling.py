"""How time a step and peak memory grow with the number of slots, forward and in training.

Every point is a process of its own, so that its peak is its own. A point that would need more
memory than is free is left out, and so is all above it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.lrua import floor_bytes

SLOTS = (128, 512, 2048, 8192, 32_768, 131_072, 524_288, 1_048_576, 2_097_152, 4_194_304)
WIDTHS = (40, 128)
HEADS = (1, 4)
STEPS = 8


def available_bytes() -> int:
    """Memory that new processes can have."""
    text = Path("/proc/meminfo").read_text()
    return 1024 * int(text.split("MemAvailable:")[1].split()[0])


def needed_bytes(slots: int, width: int, heads: int, training: bool) -> int:
    """A generous estimate: working and output memory, gradient, weights of every step."""
    copies = 4 if training else 3
    history = STEPS if training else 2
    return 4 * slots * (copies * width + (history + 4) * heads + 8) + 2**28


def point(slots: int, width: int, heads: int, training: bool, threads: int) -> dict[str, Any]:
    """Milliseconds a step (median of three sequences) and peak bytes above an idle process's."""
    call = "training_scan('native', " if training else "forward_scan("
    code = (
        f"torch.set_num_threads({threads})\n"
        f"run = workloads.{call}workloads.scan_inputs({STEPS}, 1, {slots}, {width}, {heads}))\n"
        "import statistics, time\n"
        "times = []\n"
        "for turn in range(4):\n"
        "    start = time.perf_counter(); run(); times.append(time.perf_counter() - start)\n"
        f"print('ms', statistics.median(times[1:]) * 1e3 / {STEPS})"
    )
    lines = measure.in_process(code)
    return {
        "slots": slots,
        "width": width,
        "heads": heads,
        "what": "training" if training else "forward",
        "ms_a_step": float(lines[-2].split()[1]),
        "peak_bytes": float(lines[-1]),
    }


def run(threads: int) -> dict[str, Any]:
    """All points, and the bandwidth that the floor is drawn from."""
    report: dict[str, Any] = {
        "machine": measure.machine(),
        "steps": STEPS,
        "batch": 1,
        "threads": threads,
        "bandwidth": measure.read_write_bandwidth(threads),
        "rows": [],
    }
    for training in (False, True):
        for width in WIDTHS:
            for heads in HEADS:
                for slots in SLOTS:
                    if needed_bytes(slots, width, heads, training) > available_bytes():
                        break
                    row = point(slots, width, heads, training, threads)
                    report["rows"].append(row)
                    print(json.dumps(row), flush=True)
    return report


def plot(report: dict[str, Any], path: Path) -> None:
    """Log-log curves of time and memory, with the floor of the forward pass dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (time_axis, memory_axis) = plt.subplots(1, 2, figsize=(13, 5.5))
    series = sorted({(r["what"], r["width"], r["heads"]) for r in report["rows"]})
    for index, (what, width, heads) in enumerate(series):
        rows = [
            r for r in report["rows"] if (r["what"], r["width"], r["heads"]) == (what, width, heads)
        ]
        slots = [r["slots"] for r in rows]
        label = f"{what}, W={width}, R={heads}"
        style = {"color": f"C{index % len(series)}", "marker": "o", "markersize": 3}
        time_axis.loglog(slots, [r["ms_a_step"] for r in rows], label=label, **style)
        memory_axis.loglog(
            slots, [max(r["peak_bytes"], 1) / 2**20 for r in rows], label=label, **style
        )
        if what == "forward":
            floor = [floor_bytes(n, width, heads) / report["bandwidth"] * 1e3 for n in slots]
            time_axis.loglog(slots, floor, "--", color=style["color"], linewidth=1)
    time_axis.set(
        xlabel="slots", ylabel="ms a step", title="Time a step (dashed: bytes over bandwidth)"
    )
    memory_axis.set(xlabel="slots", ylabel="MiB", title=f"Peak memory, T={report['steps']}, B=1")
    for axis in (time_axis, memory_axis):
        axis.grid(True, which="both", alpha=0.2)
        axis.legend(fontsize=8)
    figure.tight_layout()
    temporary = path.with_name("." + path.name)
    figure.savefig(temporary, dpi=110, format="png")
    temporary.replace(path)
