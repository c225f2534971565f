"""The memory of the Neural Turing Machine as a module, used as one would use ``nn.LSTM``."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from mann_ext import ops, reference
from mann_ext.memory import _inputs
from mann_ext.memory._module import MemoryModule

__all__ = ["NTMMemory", "NTMState"]


class NTMState(NamedTuple):
    """State between calls: memory (B, N, W), weights (B, H, N), read heads before write heads."""

    memory: Tensor
    weights: Tensor

    def detach(self) -> NTMState:
        """The same values, cut off from the graph: for truncated backpropagation."""
        return NTMState(*(part.detach() for part in self))


torch.serialization.add_safe_globals([NTMState])


class NTMMemory(MemoryModule[NTMState]):
    """An external memory addressed by content and by location (Graves et al. 2014).

    Each step maps the input x_t by one linear layer to what the heads need: keys k, adds a, erases
    e = sigmoid, strengths beta = softplus, gates g = sigmoid, shifts s = softmax and sharpenings
    gamma = 1 + softplus. Each head makes its weights from those it had, the write heads before the
    write and the read heads after it (:func:`mann_ext.ops.ntm_scan`)::

        w_g = g softmax(beta cos(k, M)) + (1 - g) w_{t-1}      w = sharpen(shift(w_g, s), gamma)
        M_t = M_{t-1} prod_h (1 - w_h e_h^T) + sum_h w_h a_h^T      r_r = w_r M_t

    No parameter has a slot axis, so a trained module runs with any ``num_slots``, which may be
    assigned at any time. A new memory is constant, and the weights that an episode starts with are
    one-hot at slot 0: by them the first write is not the same at all slots.

    Args:
        input_size: I, numbers in x_t.
        num_slots: N.
        slot_size: W.
        num_reads: R, read heads.
        num_writes: write heads.
        read_strength: beta at the start, of all heads.
        key_activation: "none" (the paper) or "tanh", on keys and adds.
        gate_bias: first bias of the gate's logit; positive gates address by content.
        advance_bias: at the start, added to the logit of the write heads' shift by one slot and
            taken from that of their gate. Positive, they write one slot after the other; at 0 the
            first writes are a blur that is slow to become of use.
        initial_value: what a new memory is filled with.
        batch_first: x and reads are (B, T, .) instead of (T, B, .).
        device, dtype: of the parameters; float32 or float64.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> memory = NTMMemory(input_size=16, num_slots=32, slot_size=8, num_reads=2)
        >>> reads, state = memory(torch.randn(5, 3, 16))
        >>> reads.shape, state.weights.shape
        (torch.Size([5, 3, 16]), torch.Size([3, 3, 32]))
        >>> reads, state = memory(torch.randn(5, 3, 16), state.detach())
    """

    state_class = NTMState

    def __init__(
        self,
        input_size: int,
        num_slots: int = 128,
        slot_size: int = 40,
        num_reads: int = 4,
        *,
        num_writes: int = 1,
        read_strength: float = 1.0,
        key_activation: Literal["none", "tanh"] = "none",
        gate_bias: float = 0.0,
        advance_bias: float = 0.0,
        initial_value: float = 1e-6,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _inputs.check_sizes(
            "NTMMemory", input_size=input_size, num_slots=num_slots, slot_size=slot_size,
            num_reads=num_reads, num_writes=num_writes,
        )  # fmt: skip
        if key_activation not in ("none", "tanh"):
            raise ValueError(
                f"NTMMemory: expected key_activation to be one of none, tanh, got "
                f"{key_activation!r}"
            )
        if not read_strength > 0:
            raise ValueError(f"NTMMemory: expected read_strength > 0, got {read_strength}")
        self.input_size = input_size
        self.num_slots = num_slots
        self.slot_size = slot_size
        self.num_reads = num_reads
        self.num_writes = num_writes
        self.read_strength = read_strength
        self.key_activation = key_activation
        self.gate_bias = gate_bias
        self.advance_bias = advance_bias
        self.initial_value = initial_value
        self.batch_first = batch_first
        self.interface = nn.Linear(input_size, sum(self._sizes()), device=device, dtype=dtype)
        self.reset_parameters()

    def _sizes(self) -> list[int]:
        """Of the interface's parts: keys, adds, erases, strengths, gates, sharpenings, shifts."""
        heads, written = self.num_reads + self.num_writes, self.num_writes * self.slot_size
        return [heads * self.slot_size, written, written, heads, heads, heads, 3 * heads]

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, but strengths, gates and the write heads' shifts start as the
        arguments say."""
        self.interface.reset_parameters()
        _, _, _, strengths, gates, _, shifts = self.interface.bias.detach().split(self._sizes())
        # softplus(raw) = read_strength
        strengths.fill_(self.read_strength + math.log(-math.expm1(-self.read_strength)))
        gates.fill_(self.gate_bias)
        gates[self.num_reads :] -= self.advance_bias
        shifts.view(-1, 3)[self.num_reads :, 2] += self.advance_bias

    def extra_repr(self) -> str:
        text = (
            f"{self.input_size}, num_slots={self.num_slots}, slot_size={self.slot_size}, "
            f"num_reads={self.num_reads}, num_writes={self.num_writes}, "
            f"read_strength={self.read_strength:g}"
        )
        if self.key_activation != "none":
            text += f", key_activation={self.key_activation!r}"
        return text + (", batch_first=True" if self.batch_first else "")

    def initial_state(self, batch_size: int) -> NTMState:
        """An episode's first state; its memory is an expanded constant and costs nothing."""
        weight = self.interface.weight
        memory, weights, _ = reference.fresh_state(
            batch_size, self.num_reads + self.num_writes, self.num_slots, self.slot_size,
            self.initial_value, weight.dtype, weight.device,
        )  # fmt: skip
        return NTMState(memory, weights)

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {
            "memory": (batch, self.num_slots, self.slot_size),
            "weights": (batch, self.num_reads + self.num_writes, self.num_slots),
        }

    def _scan(
        self, x: Tensor, state: NTMState, reset_mask: Tensor | None
    ) -> tuple[Tensor, NTMState]:
        parts = self.interface(x).split(self._sizes(), -1)
        keys, adds, erases = (part.unflatten(-1, (-1, self.slot_size)) for part in parts[:3])
        strengths, gates, sharpenings, shifts = parts[3:]
        if self.key_activation == "tanh":
            keys, adds = keys.tanh(), adds.tanh()
        output = ops.ntm_scan(
            *state, keys, softplus(strengths), gates.sigmoid(),
            shifts.unflatten(-1, (-1, 3)).softmax(-1), 1 + softplus(sharpenings),
            erases.sigmoid(), adds, reset_mask, initial_value=self.initial_value,
        )  # fmt: skip
        return output.reads.flatten(2).to(x.dtype), NTMState(output.memory, output.weights)
