"""The LRUA memory against its opponents and its floors, side by side in one run."""

from __future__ import annotations

import importlib.util
import time
from typing import Any

import torch

from benchmarks import measure, workloads
from benchmarks.eager import eager_scan


def floor_bytes(slots: int, width: int, heads: int) -> int:
    """Bytes a step must move forward when the memory is not in cache: 8 W + 12 R + 16 a slot."""
    return slots * (8 * width + 12 * heads + 16)


def run(repeats: int = 15, compile_steps: int = 0, large: bool = True) -> dict[str, Any]:
    """All rows. ``compile_steps`` > 0 adds torch.compile of the eager scan at that length."""
    report: dict[str, Any] = {"machine": measure.machine(), "rows": []}
    rows: list[dict[str, Any]] = report["rows"]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            paper = workloads.scan_inputs(50, 16, 128, 40, 4)
            rows.append(
                {
                    "what": "scan forward + backward, B=16 N=128 W=40 R=4 T=50",
                    "threads": threads,
                    **measure.side_by_side(
                        {
                            "native": workloads.training_scan("native", paper),
                            "eager": workloads.training_scan("eager", paper),
                            "reference": workloads.training_scan("reference", paper),
                        },
                        repeats,
                    ),
                }
            )
            rows.append(
                {
                    "what": "5-way training step, LSTM 200, B=16 T=50",
                    "threads": threads,
                    **measure.side_by_side(
                        {
                            name: workloads.training_step(name)
                            for name in ("native", "eager", "reference", "lstm", "native_lstm")
                        },
                        repeats,
                    ),
                }
            )
            others = ("dnc",) if importlib.util.find_spec("dnc") else ()
            rows.append(
                {
                    "what": "the same with read feedback",
                    "threads": threads,
                    **measure.side_by_side(
                        {
                            "native" if name == "feedback" else name: workloads.training_step(name)
                            for name in ("feedback", "stepwise", *others)
                        },
                        min(repeats, 5),
                        1,
                    ),
                }
            )
            if large:
                rows += _large(threads)
        if compile_steps:
            torch.set_num_threads(2)
            rows.append(_compiled(compile_steps, repeats))
    finally:
        torch.set_num_threads(before)
    if large:
        rows.append(_memory())
    return report


def _large(threads: int) -> list[dict[str, Any]]:
    one = workloads.scan_inputs(1, 16, 65_536, 40, 4)
    rows: list[dict[str, Any]] = [
        {
            "what": "one step forward + backward, B=16 N=65,536 W=40 R=4",
            "threads": threads,
            **measure.side_by_side(
                {
                    "native": workloads.training_scan("native", one),
                    "eager": workloads.training_scan("eager", one),
                },
                7,
                1,
            ),
        }
    ]
    del one
    sizes = (  # slots, width, heads, batch, and two lengths
        (65_536, 40, 4, 2, 12, 36),
        (1_048_576, 40, 4, 1, 4, 16),
        (1_048_576, 40, 1, 1, 12, 36),
        (524_288, 128, 4, 1, 11, 33),
        (524_288, 128, 1, 1, 23, 69),
    )
    for slots, width, heads, batch, short, long in sizes:
        inputs = workloads.scan_inputs(long, batch, slots, width, heads)
        start = (*inputs[:3], *(x[:short] for x in inputs[3:]))
        bandwidth = measure.read_write_bandwidth(threads)
        timed = measure.side_by_side(
            {
                f"{name} {steps}": workloads.forward_scan(given, chunk)
                for name, chunk in (("stepwise", 1), ("deferred", best_chunk(width, heads)))
                for steps, given in ((short, start), (long, inputs))
            },
            5,
            1,
            settle=True,
        )
        del inputs, start
        for name in ("stepwise", "deferred"):
            # The difference of two lengths is that of the steps alone, without loading and storing
            # M; the least of several runs, for what disturbs one of the two disturbs it.
            spent = timed[f"{name} {long}"]["min_ms"] - timed[f"{name} {short}"]["min_ms"]
            seconds = spent / 1e3 / (long - short)
            rows.append(
                {
                    "what": f"forward a step, {name}, B={batch} N={slots:,} W={width} R={heads}",
                    "threads": threads,
                    "native": {"min_ms": seconds * 1e3},
                    "bandwidth_GBps": bandwidth / 1e9,
                    "share_of_stepwise_floor": (
                        floor_bytes(slots, width, heads) * batch / seconds / bandwidth
                    ),
                }
            )
    return rows


def best_chunk(width: int, heads: int) -> int:
    """The library's choice where it defers writes, C = 1.25 sqrt(W / R)."""
    return round(1.25 * (width / heads) ** 0.5)


def _compiled(steps: int, repeats: int) -> dict[str, Any]:
    inputs = workloads.scan_inputs(steps, 16, 128, 40, 4)
    learnt = [x.clone().requires_grad_() for x in inputs[3:]]
    compiled = torch.compile(eager_scan, fullgraph=True)

    def run_compiled() -> None:
        torch.autograd.grad(compiled(*inputs[:3], *learnt).sum(), learnt)

    start = time.perf_counter()
    with torch._inductor.config.patch(force_disable_caches=True):  # as on a fresh machine
        run_compiled()
    seconds = time.perf_counter() - start
    return {
        "what": f"scan forward + backward, B=16 N=128 W=40 R=4 T={steps}",
        "threads": torch.get_num_threads(),
        "compile_seconds": seconds,
        **measure.side_by_side(
            {
                "native": workloads.training_scan("native", inputs),
                "eager": workloads.training_scan("eager", inputs),
                "compiled": run_compiled,
            },
            repeats,
        ),
    }


def _memory() -> dict[str, Any]:
    steps, batch, slots, width, heads = 50, 16, 65_536, 40, 4
    peak = measure.peak_memory(
        f"workloads.training_scan('native', "
        f"workloads.scan_inputs({steps}, {batch}, {slots}, {width}, {heads}))()"
    )
    copy = batch * slots * width * 4
    history = 4 * steps * batch * (heads * slots + heads * width)
    return {
        "what": "peak memory, forward + backward, T=50 B=16 N=65,536 W=40 R=4",
        "peak_bytes": peak,
        "copies_of_memory_beside_history": (peak - history) / copy,
    }


def show(report: dict[str, Any]) -> None:
    """Print the rows as a table."""
    table = []
    for row in report["rows"]:
        times = row.get("native", {})
        native = times.get("median_ms", times.get("min_ms"))
        rest = []
        for name in ("eager", "reference", "stepwise", "lstm", "native_lstm", "dnc", "compiled"):
            if name in row:
                ratio = row[name]["median_ms"] / native
                rest.append(f"{name} {row[name]['median_ms']:.3g} ms ({ratio:.2f}x)")
        for name in (
            "share_of_stepwise_floor",
            "copies_of_memory_beside_history",
            "compile_seconds",
        ):
            if name in row:
                rest.append(f"{name.replace('_', ' ')} {row[name]:.3g}")
        table.append([row["what"], row.get("threads", ""), native or "", "; ".join(rest)])
    measure.print_table("LRUA memory", ["what", "threads", "native ms", "against"], table)
