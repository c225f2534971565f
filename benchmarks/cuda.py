"""The CUDA kernels against their opponents and their floors: ``python -m benchmarks.cuda``.

Times are medians by CUDA events, contenders in turn, each run on another of several sets of inputs
so that nothing stays in cache that would not in use, with freed memory filled with NaN.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure
from benchmarks.eager import eager_scan
from benchmarks.lrua import best_chunk, floor_bytes
from benchmarks.workloads import PlainLSTM, PlainMANN
from mann_ext import ops, reference
from mann_ext.models import MANN

DEVICE = torch.device("cuda")
Run = Callable[[], object]


def side_by_side(
    contenders: Mapping[str, Sequence[Run]], repeats: int, warmup: int = 3
) -> dict[str, dict[str, float]]:
    """Median, least and most milliseconds; every contender is one callable a set of inputs."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(warmup + repeats):
        for name, runs in contenders.items():
            _poison()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            runs[turn % len(runs)]()
            end.record()
            end.synchronize()
            if turn >= warmup:
                times[name].append(start.elapsed_time(end))
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t)}
        for name, t in times.items()
    }


def _poison(bytes_: int = 2**26) -> None:
    """NaN in memory that the next outputs are likely to be given: what is not written shows."""
    torch.full((bytes_ // 4,), float("nan"), device=DEVICE)


def scan_inputs(
    steps: int, batch: int, slots: int, width: int, heads: int,
    dtype: torch.dtype = torch.float32, seed: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """memory, read_weights, usage, keys, gates, strengths, as at an episode's start."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    state = reference.fresh_state(batch, heads, slots, width, 1e-6, torch.float32, DEVICE)
    keys = torch.randn(steps, batch, heads, width, device=DEVICE, generator=generator).tanh()
    gates = torch.randn(steps, batch, heads, device=DEVICE, generator=generator).sigmoid()
    strengths = torch.full((steps, batch, heads), 10.0, device=DEVICE)
    return (state[0].to(dtype), *state[1:], keys, gates, strengths)


def native_scan(*inputs: Tensor, chunk: int | None = None) -> Tensor:
    return ops.lrua_scan(*inputs, chunk=chunk).reads


def training(scan: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Run:
    """Forward and backward, gradients to keys, gates and strengths."""
    learnt = [x.clone().requires_grad_() for x in inputs[3:]]
    return both(scan, (*inputs[:3], *learnt), learnt)


def both(run: Callable[..., Tensor], inputs: Sequence[Tensor], learnt: Sequence[Tensor]) -> Run:
    """Forward and backward, gradients to ``learnt``, which are among the inputs."""
    return lambda: torch.autograd.grad(run(*inputs).sum(), learnt)


def forward(scan: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> Run:
    def run() -> None:
        with torch.no_grad():
            scan(*inputs)

    return run


def captured(run: Run) -> Run:
    """The same as one CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def paper_size(repeats: int, compile_steps: int) -> list[dict[str, Any]]:
    """The memory alone and whole training steps at B=16, N=128, W=40, R=4."""
    rows = []
    size = {"batch": 16, "slots": 128, "width": 40, "heads": 4}
    sets = [scan_inputs(50, 16, 128, 40, 4, seed=s) for s in range(4)]
    contenders: dict[str, list[Run]] = {
        "native": [training(native_scan, x) for x in sets],
        "native, CUDA graph": [captured(training(native_scan, x)) for x in sets],
        "native, forward": [forward(native_scan, x) for x in sets],
        "eager": [training(eager_scan, x) for x in sets[:1]],
        "eager, CUDA graph": [captured(training(eager_scan, x)) for x in sets[:1]],
    }
    rows.append({"what": "scan forward + backward", "steps": 50, **size}
                | {"ms": side_by_side(contenders, repeats)})  # fmt: skip
    if compile_steps:
        short = [(*x[:3], *(part[:compile_steps] for part in x[3:])) for x in sets[:1]]
        contenders = {
            "native": [training(native_scan, x) for x in short],
            "eager": [training(eager_scan, x) for x in short],
        }
        for mode in ("default", "reduce-overhead"):
            torch._dynamo.reset()
            compiled = torch.compile(eager_scan, fullgraph=True, mode=mode)
            contenders[f"torch.compile, {mode}"] = [training(compiled, x) for x in short]
        rows.append({"what": "scan forward + backward", "steps": compile_steps, **size}
                    | {"ms": side_by_side(contenders, repeats)})  # fmt: skip
    steps = {
        "native": lambda: MANN(405, 5, read_strength=10.0, learn_strength="per_head"),
        "eager": lambda: PlainMANN(eager_scan),
        "LSTM alone": PlainLSTM,
        "native, read feedback": lambda: MANN(
            405, 5, read_strength=10.0, learn_strength="per_head", read_feedback=True
        ),
    }
    rows.append({"what": "training step, LSTM 200", "steps": 50, **size}
                | {"ms": side_by_side({k: [training_step(m())] for k, m in steps.items()},
                                      repeats)})  # fmt: skip
    feedback = {
        name: gradients(
            MANN(
                405, 5, read_strength=10.0, learn_strength="per_head", read_feedback=True,
                fused=fused,
            )
        )
        for name, fused in (("native", None), ("step by step", False))
    }  # fmt: skip
    contenders = {name: [run] for name, run in feedback.items()}
    contenders |= {f"{name}, CUDA graph": [captured(run)] for name, run in feedback.items()}
    rows.append({"what": "read feedback, forward + backward, LSTM 200", "steps": 50, **size}
                | {"ms": side_by_side(contenders, repeats)})  # fmt: skip
    return rows


def gradients(model: torch.nn.Module) -> Run:
    """A training step without the optimiser's."""
    model = model.to(DEVICE)
    parameters = list(model.parameters())
    x = torch.rand(50, 16, 405, device=DEVICE)
    y = torch.randint(5, (50 * 16,), device=DEVICE)
    return lambda: torch.autograd.grad(F.cross_entropy(model(x)[0].flatten(0, 1), y), parameters)


def training_step(model: torch.nn.Module) -> Run:
    model = model.to(DEVICE)
    x = torch.rand(50, 16, 405, device=DEVICE)
    y = torch.randint(5, (50 * 16,), device=DEVICE)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

    def run() -> None:
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run


def batches(repeats: int) -> list[dict[str, Any]]:
    """B from 1 to 4,096 at paper size, and multiply-adds a second."""
    rows = []
    for batch in (1, 4, 16, 64, 256, 1024, 4096):
        inputs = scan_inputs(50, batch, 128, 40, 4)
        ms = side_by_side(
            {
                "forward": [forward(native_scan, inputs)],
                "forward + backward": [training(native_scan, inputs)],
            },
            repeats,
        )
        numbers = 50 * batch * 128 * 40
        rows.append(
            {
                "what": "batch", "batch": batch, "ms": ms,
                # 3 R + 1 multiply-adds an element forward, 8 R + 2 backward.
                "forward_TFLOPs": 2 * 13 * numbers / ms["forward"]["median_ms"] / 1e9,
                "both_TFLOPs": 2 * 47 * numbers / ms["forward + backward"]["median_ms"] / 1e9,
            }
        )  # fmt: skip
    return rows


def regimes(repeats: int) -> list[dict[str, Any]]:
    """Memories of a few thousand slots: shared out between the blocks of a cluster, or streamed."""
    rows = []
    for batch in (1, 16):
        for slots in (1024, 2048, 4096, 7168):
            inputs = scan_inputs(50, batch, slots, 40, 4)
            contenders = {
                f"{name}, {regime}": [in_regime(regime, make(native_scan, inputs))]
                for name, make in (("forward", forward), ("forward + backward", training))
                for regime in ("cluster", "streaming")
            }
            ms = side_by_side(contenders, repeats)
            rows.append({"what": "regimes", "batch": batch, "slots": slots, "ms": ms})
    return rows


def in_regime(regime: str, run: Run) -> Run:
    """With the kernels of this regime: `resident_blocks` in csrc/cuda/lrua_arguments.h."""

    def changed() -> None:
        with mock.patch.dict(os.environ, MANN_EXT_CUDA_REGIME=regime):
            run()

    return changed


def copy_bandwidth() -> float:
    """Bytes read plus written a second by a large copy on the device."""
    source = torch.rand(2**29, device=DEVICE)
    target = torch.empty_like(source)
    ms = side_by_side({"copy": [lambda: target.copy_(source)]}, 10)["copy"]["median_ms"]
    return 2 * source.numel() * 4 / ms * 1e3


def streaming(repeats: int) -> list[dict[str, Any]]:
    """Time a step forward and backward by number of slots, as a share of the floor's."""
    rows = []
    stepwise = partial(native_scan, chunk=1)
    short, long = 4, 12
    for width in (40, 128):
        for slots in (65_536, 262_144, 1_048_576, 4_194_304):
            for dtype in (torch.float32, torch.bfloat16):
                bandwidth = copy_bandwidth()
                sets = {s: scan_inputs(s, 1, slots, width, 4, dtype) for s in (short, long)}
                ms = side_by_side(
                    {
                        f"{name} {s}": [make(stepwise, x)]
                        for name, make in (("forward", forward), ("both", training))
                        for s, x in sets.items()
                    },
                    repeats,
                )
                del sets
                # The difference of two lengths is that of the steps alone.
                per = {
                    name: (ms[f"{name} {long}"]["median_ms"] - ms[f"{name} {short}"]["median_ms"])
                    / (long - short)
                    for name in ("forward", "both")
                }
                backward = per["both"] - per["forward"]
                number = dtype.itemsize
                floors = {
                    "forward": floor_bytes(slots, width, 4) - 2 * (4 - number) * width * slots,
                    # Rolled back: M and its gradient (float32) read and written, weights passed.
                    "backward": slots * (2 * number * width + 8 * width + 64),
                }
                rows.append(
                    {
                        "what": "streaming", "slots": slots, "width": width, "heads": 4,
                        "dtype": str(dtype), "bandwidth_TBps": bandwidth / 1e12,
                        "forward_ms": per["forward"], "backward_ms": backward,
                        "forward_share": floors["forward"] / bandwidth / per["forward"] * 1e3,
                        "backward_share": floors["backward"] / bandwidth / backward * 1e3,
                    }
                )  # fmt: skip
                torch.cuda.empty_cache()
            rows.append(chunked(slots, width, repeats))
    return rows


def chunked(slots: int, width: int, repeats: int, heads: int = 4) -> dict[str, Any]:
    """Time a step forward with deferred writes, as a share of the floor's without them."""
    chunk = best_chunk(width, heads)
    short, long = chunk, 3 * chunk  # the difference is that of whole chunks
    bandwidth = copy_bandwidth()
    scan = partial(native_scan, chunk=chunk)
    inputs = {s: scan_inputs(s, 1, slots, width, heads) for s in (short, long)}
    ms = side_by_side({f"{s}": [forward(scan, x)] for s, x in inputs.items()}, repeats)
    del inputs
    torch.cuda.empty_cache()
    step = (ms[f"{long}"]["median_ms"] - ms[f"{short}"]["median_ms"]) / (long - short)
    return {
        "what": "streaming, chunked", "slots": slots, "width": width, "heads": heads,
        "dtype": str(torch.float32), "chunk": chunk, "bandwidth_TBps": bandwidth / 1e12,
        "forward_ms": step,
        "share_of_stepwise_floor": floor_bytes(slots, width, heads) / bandwidth / step * 1e3,
    }  # fmt: skip


def coordinates(repeats: int, steps: int = 5, count: int = 152_000) -> list[dict[str, Any]]:
    """The LSTM over coordinates at MetaNet's size, and multiply-adds a second."""
    lstm, output = torch.nn.LSTM(2, 20, device=DEVICE), torch.nn.Linear(20, 1, device=DEVICE)
    weights = [*lstm.parameters(), *output.parameters()]
    gradients = [torch.randn(steps, count, device=DEVICE) for _ in range(4)]

    def cudnn(g: Tensor, *_: Tensor) -> Tensor:
        return output(lstm(reference.gradient_features(g))[1][0][0]).squeeze(-1)

    contenders: dict[str, list[Run]] = {}
    for name, run in (("native", ops.coordinate_lstm), ("nn.LSTM", cudnn)):
        contenders[name] = [both(run, (g, *weights), weights) for g in gradients]
        contenders[f"{name}, forward"] = [forward(run, (g, *weights)) for g in gradients]
    ms = side_by_side(contenders, repeats)
    products = 4 * 20 * 23 * steps * count
    return [
        {
            "what": "coordinate_lstm", "steps": steps, "coordinates": count, "hidden": 20, "ms": ms,
            "forward_TFLOPs": 2 * products / ms["native, forward"]["median_ms"] / 1e9,
            "both_TFLOPs": 2 * 5 * products / ms["native"]["median_ms"] / 1e9,
        }
    ]  # fmt: skip


def lstms(repeats: int, steps: int = 50, width: int = 405) -> list[dict[str, Any]]:
    """An LSTM of 200 units against cuDNN's, by batch size; `CUDNN_BATCH` in mann_ext/models is
    where it should be given up."""
    rows = []
    for batch in (1, 16, 64, 256, 512, 1024):
        module = torch.nn.LSTM(width, 200, device=DEVICE)
        weights = list(module.parameters())
        zeros = torch.zeros(batch, 200, device=DEVICE)
        sets = [(torch.rand(steps, batch, width, device=DEVICE), *weights) for _ in range(4)]

        def native(x: Tensor, *weights: Tensor, zeros: Tensor = zeros) -> Tensor:
            return ops.lstm_scan(x, zeros, zeros, *weights).hidden

        def cudnn(x: Tensor, *_: Tensor, module: torch.nn.LSTM = module) -> Tensor:
            hidden: Tensor = module(x)[0]
            return hidden

        contenders: dict[str, list[Run]] = {}
        for name, run in (("native", native), ("cuDNN", cudnn)):
            contenders[name] = [both(run, inputs, weights) for inputs in sets]
            contenders[f"{name}, forward"] = [forward(run, inputs) for inputs in sets]
        ms = side_by_side(contenders, repeats)
        rows.append({"what": "LSTM 200", "steps": steps, "batch": batch, "ms": ms})
    return rows


def pooled_relus(repeats: int, queries: int = 50) -> list[dict[str, Any]]:
    """The first layer of a MetaNet's base learner after its convolutions, as a share of the
    bandwidth."""
    shape = (queries, 64, 28, 28)
    parts = [
        tuple(torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))
        for _ in range(4)
    ]

    contenders: dict[str, list[Run]] = {}
    for name, run in (("native", ops.relu_pool), ("eager", reference.relu_pool)):
        contenders[name] = [both(run, inputs, inputs) for inputs in parts]
        contenders[f"{name}, forward"] = [forward(run, inputs) for inputs in parts]
    bandwidth = copy_bandwidth()
    ms = side_by_side(contenders, repeats)
    moved = parts[0][0].numel() * (2 * 4 + (4 + 1) / 4)
    return [
        {
            "what": "relu_pool", "shape": shape, "ms": ms, "bandwidth_TBps": bandwidth / 1e12,
            "forward_share": moved / bandwidth / ms["native, forward"]["median_ms"] * 1e3,
        }
    ]  # fmt: skip


def peak_memory() -> list[dict[str, Any]]:
    """Training at T=100, N=1,048,576, W=64: copies of the memory beside the weights kept."""
    steps, slots, width, heads = 100, 1_048_576, 64, 4
    rows = []
    for name, scan in (("native", native_scan), ("eager", eager_scan)):
        inputs = scan_inputs(steps, 1, slots, width, heads)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {
            "what": "peak memory, T=100 N=1,048,576 W=64 R=4", "contender": name
        }  # fmt: skip
        try:
            training(scan, inputs)()
            peak = torch.cuda.max_memory_allocated() - before
            history = 4 * steps * (heads * slots + heads * width)
            row |= {"peak_bytes": peak, "copies": (peak - history) / (4 * slots * width)}
        except torch.cuda.OutOfMemoryError:
            row["peak_bytes"] = "out of memory"
        rows.append(row)
        del inputs
        torch.cuda.empty_cache()
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        times = row.get("ms")
        facts = {k: v for k, v in row.items() if k != "ms"}
        print(", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                        for k, v in facts.items()))  # fmt: skip
        for name, ms in (times or {}).items():
            base = (times or {}).get("native", ms)["median_ms"]
            print(f"    {name:28} {ms['median_ms']:9.3f} ms   {ms['median_ms'] / base:7.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--compile-steps", type=int, default=0, help="torch.compile rows at this length (minutes)"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.cuda: this needs a GPU that torch can use; none was found")
    report: dict[str, Any] = {
        "machine": measure.machine() | {"gpu": torch.cuda.get_device_name()},
        "rows": [],
    }
    for part in (
        lambda: paper_size(arguments.repeats, arguments.compile_steps),
        lambda: batches(arguments.repeats),
        lambda: regimes(min(arguments.repeats, 10)),
        lambda: streaming(min(arguments.repeats, 7)),
        lambda: lstms(arguments.repeats),
        lambda: coordinates(arguments.repeats),
        lambda: pooled_relus(arguments.repeats),
        peak_memory,
    ):
        rows = part()
        show(rows)
        report["rows"] += rows
        if arguments.json is not None:  # after every part: a run cut short leaves what it had
            measure.write_json(arguments.json, report)


if __name__ == "__main__":
    main()
