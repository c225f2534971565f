"""The LRUA memory as a module, used as one would use ``nn.LSTM``."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from mann_ext import ops, reference
from mann_ext.memory import _inputs
from mann_ext.memory._module import MemoryModule
from mann_ext.ops._common import MEMORY_DTYPES
from mann_ext.ops.lrua import LeastUsed

__all__ = ["LRUAMemory", "LRUAMemoryTrace", "LRUAState", "LearnStrength"]

LearnStrength = Literal["no", "per_head", "per_step"]


class LRUAState(NamedTuple):
    """State between calls: memory (B, N, W), read_weights (B, R, N), usage (B, N)."""

    memory: Tensor
    read_weights: Tensor
    usage: Tensor

    def detach(self) -> LRUAState:
        """The same values, cut off from the graph: for truncated backpropagation."""
        return LRUAState(*(part.detach() for part in self))


class LRUAMemoryTrace(NamedTuple):
    """What every step of a call did to the memory, for analysis and figures; no gradient.

    Laid out as the call's x: (T, B, ...), (B, T, ...) with ``batch_first``, (T, ...) unbatched.

    read_weights, write_weights: (T, B, R, N), the step's own w_r and w_w (eqs. 3 and 22).
    usage: (T, B, N) and memory (T, B, N, W), after the step.
    slots: (T, B, n) int64, the n = min(R, N) least-used slots, which the step erased and wrote.
    keys: (T, B, R, W); contents (T, B, R, W), what was written: the keys, if not learnt apart.
    gates, strengths: (T, B, R), g and beta.
    """

    read_weights: Tensor
    write_weights: Tensor
    usage: Tensor
    memory: Tensor
    slots: Tensor
    keys: Tensor
    contents: Tensor
    gates: Tensor
    strengths: Tensor


torch.serialization.add_safe_globals([LRUAState, LRUAMemoryTrace])


class LRUAMemory(MemoryModule[LRUAState]):
    """An external memory read by content and written to its least recently used slots.

    Each step maps the input x_t by one linear layer to keys, gates and, where asked for, contents
    and strengths, and then (Santoro et al. 2016, eqs. 2-8 and 17-23)::

        w_w = g w_r,{t-1} + (1 - g) lu       M_t = erase(M_{t-1}) + sum_r w_w,r a_r^T
        w_r = softmax(beta cos(k_r, M_t))    r_r = w_r M_t
        u_t = usage_decay u_{t-1} + sum_r (w_r + w_w,r)

    No parameter has a slot axis, so a trained module runs with any ``num_slots``, which may be
    assigned at any time.

    Args:
        input_size: I, numbers in x_t.
        num_slots: N.
        slot_size: W.
        num_reads: R, read heads.
        usage_decay: gamma, in [0, 1].
        least_used: "shared" (every head writes to all n = min(R, N) least-used slots, the paper's
            eqs. 6-7) or "per_head" (head r to the r-th of them). Shared is the default: it learned
            five-way Omniglot faster and to a higher accuracy in side-by-side runs.
        read_strength: beta, or its first value where it is learnt. The paper has 1, with which
            the softmax over cosines is nearly flat; around 10 it learns.
        learn_strength: "no", "per_head" (R parameters) or "per_step" (from x_t); positive always.
        write_content: learn what is written apart from the keys (the paper writes the keys).
        key_activation: "none" (the paper) or "tanh", on keys and contents.
        gate_bias: first bias of the gate's logit.
        initial_value: what a new memory is filled with.
        batch_first: x and reads are (B, T, .) instead of (T, B, .).
        memory_dtype: storage type of the memory; None: that of the parameters.
        device, dtype: of the parameters.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Example:
        >>> memory = LRUAMemory(input_size=16, num_slots=32, slot_size=8, num_reads=2)
        >>> reads, state = memory(torch.randn(5, 3, 16))
        >>> reads.shape, state.memory.shape
        (torch.Size([5, 3, 16]), torch.Size([3, 32, 8]))
        >>> reads, state = memory(torch.randn(5, 3, 16), state.detach())
    """

    state_class = LRUAState

    def __init__(
        self,
        input_size: int,
        num_slots: int = 128,
        slot_size: int = 40,
        num_reads: int = 4,
        *,
        usage_decay: float = 0.99,
        least_used: LeastUsed = "shared",
        read_strength: float = 1.0,
        learn_strength: LearnStrength = "no",
        write_content: bool = False,
        key_activation: Literal["none", "tanh"] = "none",
        gate_bias: float = 0.0,
        initial_value: float = 1e-6,
        batch_first: bool = False,
        memory_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _inputs.check_sizes(
            "LRUAMemory", input_size=input_size, num_slots=num_slots, slot_size=slot_size,
            num_reads=num_reads,
        )  # fmt: skip
        choices: dict[str, tuple[str, tuple[str, ...]]] = {
            "least_used": (least_used, ("per_head", "shared")),
            "learn_strength": (learn_strength, ("no", "per_head", "per_step")),
            "key_activation": (key_activation, ("none", "tanh")),
        }
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(
                    f"LRUAMemory: expected {name} to be one of {', '.join(allowed)}, got {value!r}"
                )
        if not 0 <= usage_decay <= 1:
            raise ValueError(f"LRUAMemory: expected usage_decay in [0, 1], got {usage_decay}")
        if not read_strength > 0:
            raise ValueError(f"LRUAMemory: expected read_strength > 0, got {read_strength}")
        if memory_dtype is not None and memory_dtype not in MEMORY_DTYPES:
            raise TypeError(
                "LRUAMemory: expected memory_dtype float32, float64, bfloat16 or float16, got "
                f"{memory_dtype}"
            )
        self.input_size = input_size
        self.num_slots = num_slots
        self.slot_size = slot_size
        self.num_reads = num_reads
        self.usage_decay = usage_decay
        self.least_used = least_used
        self.read_strength = read_strength
        self.learn_strength = learn_strength
        self.write_content = write_content
        self.key_activation = key_activation
        self.gate_bias = gate_bias
        self.initial_value = initial_value
        self.batch_first = batch_first
        self.memory_dtype = memory_dtype
        # Its outputs: keys, contents if write_content, gates, strengths if learnt per step.
        numbers = num_reads * slot_size * (2 if write_content else 1)
        numbers += num_reads * (2 if learn_strength == "per_step" else 1)
        self.interface = nn.Linear(input_size, numbers, device=device, dtype=dtype)
        if learn_strength == "per_head":
            self.raw_strength = nn.Parameter(torch.empty(num_reads, device=device, dtype=dtype))
        else:
            self.register_parameter("raw_strength", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Linear layer as ``nn.Linear``; gate biases at ``gate_bias``, strengths at their start."""
        self.interface.reset_parameters()
        # softplus(raw) = read_strength
        raw = self.read_strength + math.log(-math.expm1(-self.read_strength))
        with torch.no_grad():
            scalars = self.interface.bias[self.output_size * (2 if self.write_content else 1) :]
            scalars[: self.num_reads].fill_(self.gate_bias)
            scalars[self.num_reads :].fill_(raw)  # strengths learnt per step, if any
            if self.raw_strength is not None:
                self.raw_strength.fill_(raw)

    def extra_repr(self) -> str:
        text = (
            f"{self.input_size}, num_slots={self.num_slots}, slot_size={self.slot_size}, "
            f"num_reads={self.num_reads}, least_used={self.least_used!r}, "
            f"read_strength={self.read_strength:g}, learn_strength={self.learn_strength!r}"
        )
        if self.write_content:
            text += ", write_content=True"
        if self.key_activation != "none":
            text += f", key_activation={self.key_activation!r}"
        return text + (", batch_first=True" if self.batch_first else "")

    def initial_state(self, batch_size: int) -> LRUAState:
        """An episode's first state; its memory is an expanded constant and costs nothing."""
        weight = self.interface.weight
        return LRUAState(
            *reference.fresh_state(
                batch_size, self.num_reads, self.num_slots, self.slot_size, self.initial_value,
                self.memory_dtype or weight.dtype, weight.device,
            )
        )  # fmt: skip

    @overload
    def forward(
        self,
        x: Tensor | PackedSequence,
        state: LRUAState | None = None,
        *,
        reset_mask: Tensor | None = None,
        return_trace: Literal[False] = False,
    ) -> tuple[Any, LRUAState]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: LRUAState | None = None,
        *,
        reset_mask: Tensor | None = None,
        return_trace: Literal[True],
    ) -> tuple[Tensor, LRUAState, LRUAMemoryTrace]: ...

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: LRUAState | None = None,
        *,
        reset_mask: Tensor | None = None,
        return_trace: bool = False,
    ) -> tuple[Any, LRUAState] | tuple[Tensor, LRUAState, LRUAMemoryTrace]:
        """Run a sequence.

        Args:
            x: (T, B, I), (B, T, I) if ``batch_first``, (T, I) unbatched, or a PackedSequence; of
                the parameters' dtype.
            state: where to go on from, unbatched for unbatched x; None: ``initial_state``. The
                memory stays in the dtype it comes in.
            reset_mask: bool of x's leading shape: True starts a new episode at that step.
            return_trace: also return what every step did. The sequence then runs step by step,
                and every step's memory is kept: T B N W numbers.

        Returns:
            reads (T, B, R * W) laid out as x (packed for packed x) in x's dtype, and the state
            after the last step; for packed x, each sequence's state after its own last step.
            With ``return_trace`` also an :class:`LRUAMemoryTrace` of these very reads.

        Raises:
            ValueError, TypeError: x, state or reset_mask does not fit; the message says how.
        """
        if not return_trace:
            return super().forward(x, state, reset_mask=reset_mask)
        if isinstance(x, PackedSequence):
            raise ValueError(
                "LRUAMemory: return_trace does not go with a PackedSequence; pass padded x "
                "instead, and leave out the steps after each sequence's end"
            )
        x, state, reset_mask, batched = self._time_first(x, state, reset_mask)
        reads, state, trace = self._trace(x, state, reset_mask)
        laid_out = LRUAMemoryTrace(*(self._laid_out(part, batched) for part in trace))
        return self._laid_out(reads, batched), self._state_laid_out(state, batched), laid_out

    def _scan(
        self, x: Tensor, state: LRUAState, reset_mask: Tensor | None
    ) -> tuple[Tensor, LRUAState]:
        keys, gates, strengths, contents = self._arguments(x)
        output = ops.lrua_scan(
            *state, keys, gates, strengths, contents, reset_mask, usage_decay=self.usage_decay,
            least_used=self.least_used, initial_value=self.initial_value,
        )  # fmt: skip
        return output.reads.flatten(2).to(x.dtype), LRUAState(*output[1:])

    def _trace(
        self, x: Tensor, state: LRUAState | None, reset_mask: Tensor | None
    ) -> tuple[Tensor, LRUAState, LRUAMemoryTrace]:
        """`_scan` step by step, noting what each does."""
        steps, batch = x.shape[:2]
        _inputs.check_traceable("LRUAMemory", x)
        self.check_state(state, batch, x)
        state = self.initial_state(batch) if state is None else state
        # What the operator computes with: the accumulation dtype, but for the memory.
        dtype = state.memory.dtype
        acc = reference.accumulation_dtype(dtype)
        state = LRUAState(state.memory, state.read_weights.to(acc), state.usage.to(acc))
        keys, gates, strengths, contents = self._arguments(x)
        keys, gates = keys.to(acc), gates.to(acc)
        strengths = torch.ones_like(gates) if strengths is None else strengths.to(acc)
        contents = keys if contents is None else contents.to(acc)
        fresh = reference.fresh_state(
            batch, self.num_reads, self.num_slots, self.slot_size, self.initial_value, dtype,
            x.device,
        )  # fmt: skip
        reads, done = [], []
        for t in range(steps):
            if reset_mask is not None:
                new = reset_mask[t].view(batch, 1, 1)
                masks = (new, new, new.squeeze(-1))
                state = LRUAState(*map(torch.where, masks, fresh, state))
            slots = reference.least_used_slots(state.usage, min(self.num_reads, self.num_slots))
            written = reference.write_weights(state.read_weights, gates[t], slots, self.least_used)
            output = ops.lrua_step(
                *state, keys[t], gates[t], strengths[t], contents[t],
                usage_decay=self.usage_decay, least_used=self.least_used,
            )  # fmt: skip
            reads.append(output.reads)
            state = LRUAState(*output[1:])
            done.append((state.read_weights, written, state.usage, state.memory, slots))
        parts = [torch.stack([part.detach() for part in each]) for each in zip(*done, strict=True)]
        inputs = (part.detach() for part in (keys, contents, gates, strengths))
        trace = LRUAMemoryTrace(*parts, *inputs)
        return torch.stack(reads).flatten(2).to(x.dtype), state, trace

    def _arguments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x (T, B, I) -> the operator's keys, gates, strengths and contents."""
        heads, vector = self.num_reads, self.output_size
        sizes = [vector, vector, heads] if self.write_content else [vector, heads]
        if self.learn_strength == "per_step":
            sizes.append(heads)
        keys, *others = self.interface(x).split(sizes, -1)
        contents = self._vectors(others.pop(0)) if self.write_content else None
        gates = others[0].sigmoid()
        return self._vectors(keys), gates, self._strengths(gates, others[-1]), contents

    def _vectors(self, part: Tensor) -> Tensor:
        """(T, B, R * W) -> (T, B, R, W)."""
        activated = part.tanh() if self.key_activation == "tanh" else part
        return activated.unflatten(-1, (self.num_reads, self.slot_size))

    raw_strength: nn.Parameter | None

    def head_strengths(self) -> Tensor | None:
        """beta (R,) of every step; None where it is 1, or made from each x_t."""
        if self.raw_strength is not None:
            return nn.functional.softplus(self.raw_strength)
        if self.read_strength == 1 or self.learn_strength == "per_step":
            return None
        return self.interface.weight.new_full((self.num_reads,), self.read_strength)

    def _strengths(self, gates: Tensor, raw: Tensor) -> Tensor | None:
        """beta (T, B, R), or None where it is 1; ``raw`` is the interface's last part."""
        if self.learn_strength == "per_step":
            return nn.functional.softplus(raw)
        strengths = self.head_strengths()
        return None if strengths is None else strengths.expand_as(gates)

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        return {
            "memory": (batch, self.num_slots, self.slot_size),
            "read_weights": (batch, self.num_reads, self.num_slots),
            "usage": (batch, self.num_slots),
        }
