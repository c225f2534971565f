"""What is timed: the memory alone, and whole training steps, native and as opponents."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.eager import eager_scan
from mann_ext import LRUAMemory, ops, reference
from mann_ext.models import LSTM, MANN


def scan_inputs(
    steps: int, batch: int, slots: int, width: int, heads: int, seed: int = 0
) -> tuple[Tensor, ...]:
    """memory, read_weights, usage, keys, gates, strengths, as at an episode's start."""
    torch.manual_seed(seed)
    state = reference.fresh_state(
        batch, heads, slots, width, 1e-6, torch.float32, torch.device("cpu")
    )
    keys = torch.randn(steps, batch, heads, width).tanh()
    gates = torch.randn(steps, batch, heads).sigmoid()
    return (*state, keys, gates, torch.full((steps, batch, heads), 10.0))


def warm_up() -> None:
    """Load and run everything once at a small size, so that later growth is the workload's."""
    step = training_scan("native", scan_inputs(2, 2, 64, 8, 2))
    step()
    training_scan("eager", scan_inputs(2, 2, 64, 8, 2))()


_SCANS: dict[str, Callable[..., Tensor]] = {
    "native": lambda *a: ops.lrua_scan(*a).reads,
    "eager": eager_scan,
    "reference": lambda *a: reference.lrua_scan(*a)[0],
}


def training_scan(name: str, inputs: tuple[Tensor, ...]) -> Callable[[], None]:
    """Forward and backward of the memory alone, gradients to keys, gates and strengths."""
    memory, read_weights, usage, *rest = inputs
    learnt = [x.clone().requires_grad_() for x in rest]
    scan = _SCANS[name]

    def run() -> None:
        torch.autograd.grad(scan(memory, read_weights, usage, *learnt).sum(), learnt)

    return run


def forward_scan(inputs: tuple[Tensor, ...], chunk: int | None = None) -> Callable[[], None]:
    """Forward of the native memory alone, without gradients."""

    def run() -> None:
        with torch.no_grad():
            ops.lrua_scan(*inputs, chunk=chunk)

    return run


class PlainMANN(nn.Module):
    """The MANN of mann_ext.models in PyTorch's own parts: nn.LSTM, and the memory in plain PyTorch.

    Args:
        scan: what runs the memory, ``eager_scan`` or the reference.
    """

    def __init__(self, scan: Callable[..., Tensor]) -> None:
        super().__init__()
        self.scan = scan
        self.lstm = nn.LSTM(405, 200)
        inner = MANN(405, 5, read_strength=10.0, learn_strength="per_head")
        self.memory, self.output = inner.memory, inner.output

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        memory = self.memory
        steps, batch, _ = x.shape
        hidden, _ = self.lstm(x)
        interface = memory.interface(hidden)
        keys, gates = interface.split([memory.output_size, memory.num_reads], -1)
        assert isinstance(memory, LRUAMemory)
        assert memory.raw_strength is not None
        strengths = F.softplus(memory.raw_strength).expand(steps, batch, memory.num_reads)
        reads = self.scan(
            *memory.initial_state(batch),
            keys.reshape(steps, batch, memory.num_reads, memory.slot_size),
            gates.sigmoid(),
            strengths,
        )
        return self.output(torch.cat([hidden, reads.flatten(2)], -1)), None


class PlainLSTM(nn.Module):
    """PyTorch's LSTM with the same output layer and no memory."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.output = nn.LSTM(405, 200), nn.Linear(200, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.output(self.lstm(x)[0]), None


class OtherDNC(nn.Module):
    """PyPI's ``dnc`` at the same sizes: another memory, whose reads are always fed back."""

    def __init__(self) -> None:
        super().__init__()
        import dnc

        self.dnc = dnc.DNC(
            input_size=405, hidden_size=200, rnn_type="lstm", num_layers=1, nr_cells=128,
            cell_size=40, read_heads=4, batch_first=False, gpu_id=-1,
        )  # fmt: skip
        self.output = nn.Linear(405, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return self.output(self.dnc(x, None, reset_experience=True)[0]), None


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "native": lambda: MANN(405, 5, read_strength=10.0, learn_strength="per_head"),
    "feedback": lambda: MANN(
        405, 5, read_strength=10.0, learn_strength="per_head", read_feedback=True
    ),
    "stepwise": lambda: MANN(
        405, 5, read_strength=10.0, learn_strength="per_head", read_feedback=True, fused=False
    ),
    "native_lstm": lambda: LSTM(405, 5),
    "eager": lambda: PlainMANN(_SCANS["eager"]),
    "reference": lambda: PlainMANN(_SCANS["reference"]),
    "lstm": PlainLSTM,
    "dnc": OtherDNC,
}


def training_step(name: str, batch: int = 16, steps: int = 50) -> Callable[[], None]:
    """One optimiser step of the 5-way task, 200 hidden units; ``name`` as in ``_MODELS``."""
    torch.manual_seed(0)
    model = _MODELS[name]()
    x, y = torch.rand(steps, batch, 405), torch.randint(5, (steps * batch,))
    optimiser = torch.optim.Adam(model.parameters(), 1e-3, fused=True)

    def run() -> None:
        loss = F.cross_entropy(model(x)[0].flatten(0, 1), y)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return run
