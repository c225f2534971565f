"""How exact are gradients when the memory is rolled back instead of saved?

For each length, strength and initial memory: the error of the keys' gradient in float32 against
the same kernel in float64 with every M_t saved, worst of those of five seeds whose choice of slots
is the same in both (None: of no seed).
"""

from __future__ import annotations

from typing import Any

import torch

from mann_ext import _library, reference

SLOTS, WIDTH, HEADS, BATCH = 128, 40, 4, 2


def _gradient(inputs: dict[str, Any], grad: torch.Tensor, snapshot_every: int) -> Any:
    op = torch.ops.mann_ext
    out = op.lrua_scan(
        inputs["memory"], inputs["read_weights"], inputs["usage"], inputs["keys"],
        inputs["gates"], inputs["strengths"], None, None, 0.99, False, 1e-8, 1e-6,
        snapshot_every, 1, True,
    )  # fmt: skip
    reads, memory_out, _, _, *history = out
    grads = op.lrua_scan_backward(
        grad, None, None, inputs["memory"], inputs["read_weights"], inputs["keys"],
        inputs["gates"], inputs["strengths"], None, None, reads, memory_out, *history, False,
        1e-8, 1e-6, snapshot_every, False,
    )  # fmt: skip
    return grads[2], history[1]


def _inputs(steps: int, strength: float, tiny: bool, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    memory, read_weights, usage = reference.fresh_state(
        BATCH, HEADS, SLOTS, WIDTH, 1e-6, torch.float32, torch.device("cpu")
    )
    if not tiny:
        memory = 0.1 * torch.randn(BATCH, SLOTS, WIDTH)
    return {
        "memory": memory,
        "read_weights": read_weights,
        "usage": usage,
        "keys": torch.randn(steps, BATCH, HEADS, WIDTH).tanh(),
        "gates": torch.randn(steps, BATCH, HEADS).sigmoid(),
        "strengths": torch.full((steps, BATCH, HEADS), strength),
    }


def run() -> list[dict[str, Any]]:
    """One row a setting: relative errors with every M_t saved and rolled back."""
    if not _library.native_available():
        raise SystemExit("drift: the native operators are not built; run `make build`")
    rows = []
    for tiny in (True, False):
        for strength in (1.0, 10.0):
            for steps in (50, 200, 1000):
                worst: dict[str, float | None] = {"saved": None, "rolled_back": None}
                same = 1.0
                for seed in range(5):
                    single = _inputs(steps, strength, tiny, seed)
                    double = {name: x.double() for name, x in single.items()}
                    grad = torch.randn(steps, BATCH, HEADS, WIDTH)
                    exact, slots = _gradient(double, grad.double(), 1)
                    for name, every in (("saved", 1), ("rolled_back", 0)):
                        got, chosen = _gradient(single, grad, every)
                        error = ((got - exact).norm() / exact.norm()).item()
                        if torch.equal(chosen, slots):
                            worst[name] = max(worst[name] or 0.0, error)
                    same = min(same, (chosen == slots).double().mean().item())
                rows.append(
                    {
                        "initial_memory": "1e-6" if tiny else "0.1 randn",
                        "strength": strength,
                        "steps": steps,
                        **worst,
                        "slots_as_in_float64": same,
                    }
                )
    return rows
