"""What all memories share as modules: layouts, packed sequences, states and their checks."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from mann_ext.memory import _inputs

__all__ = ["MemoryModule"]

State = TypeVar("State", bound=tuple[Tensor, ...])


class MemoryModule(nn.Module, Generic[State]):
    """A memory whose parameters are in one linear layer, ``interface``, that x_t goes through.

    A subclass sets the attributes below, and defines ``initial_state``, ``_shapes`` and ``_scan``.
    """

    state_class: type[State]
    interface: nn.Linear
    input_size: int
    slot_size: int
    num_reads: int
    batch_first: bool

    @property
    def output_size(self) -> int:
        """R * W, numbers in the reads of one step."""
        return self.num_reads * self.slot_size

    def initial_state(self, batch_size: int) -> State:
        """An episode's first state; its memory is an expanded constant and costs nothing."""
        raise NotImplementedError

    def _shapes(self, batch: int) -> dict[str, tuple[int, ...]]:
        """Of the state's parts."""
        raise NotImplementedError

    def _scan(self, x: Tensor, state: State, reset_mask: Tensor | None) -> tuple[Tensor, State]:
        """x (T, B, I) -> reads (T, B, R * W), and the state after the last step."""
        raise NotImplementedError

    def forward(
        self,
        x: Tensor | PackedSequence,
        state: State | None = None,
        *,
        reset_mask: Tensor | None = None,
    ) -> tuple[Any, State]:
        """Run a sequence.

        Args:
            x: (T, B, I), (B, T, I) if ``batch_first``, (T, I) unbatched, or a PackedSequence; of
                the parameters' dtype.
            state: where to go on from, unbatched for unbatched x; None: ``initial_state``. The
                memory stays in the dtype it comes in.
            reset_mask: bool of x's leading shape: True starts a new episode at that step.

        Returns:
            reads (T, B, R * W) laid out as x (packed for packed x) in x's dtype, and the state
            after the last step; for packed x, each sequence's state after its own last step.

        Raises:
            ValueError, TypeError: x, state or reset_mask does not fit; the message says how.
        """
        if isinstance(x, PackedSequence):
            return self._forward_packed(x, state, reset_mask)
        x, state, reset_mask, batched = self._time_first(x, state, reset_mask)
        reads, state = self._checked_scan(x, state, reset_mask)
        return self._laid_out(reads, batched), self._state_laid_out(state, batched)

    def _time_first(
        self, x: Tensor, state: State | None, reset_mask: Tensor | None
    ) -> tuple[Tensor, State | None, Tensor | None, bool]:
        """The arguments of `forward`, checked, with x (T, B, I), and whether x had a batch."""
        name = type(self).__name__
        layout = "(B, T, I)" if self.batch_first else "(T, B, I)"
        layout += f" or (T, I) with I={self.input_size}"
        _inputs.check_input(name, x, self.interface.weight, self.input_size, layout, (2, 3))
        _inputs.check_reset_mask(name, reset_mask, x)
        if x.dim() == 2:
            self.check_state(state, 0, x, batched=False)
            state = None if state is None else self._state(part.unsqueeze(0) for part in state)
            mask = None if reset_mask is None else reset_mask.unsqueeze(1)
            return x.unsqueeze(1), state, mask, False
        if self.batch_first:
            x = x.transpose(0, 1)
            reset_mask = None if reset_mask is None else reset_mask.transpose(0, 1)
        return x, state, reset_mask, True

    def _laid_out(self, part: Tensor, batched: bool) -> Tensor:
        """(T, B, ...) as the caller's x is."""
        if not batched:
            return part.squeeze(1)
        return part.transpose(0, 1) if self.batch_first else part

    def _state_laid_out(self, state: State, batched: bool) -> State:
        return state if batched else self._state(part.squeeze(0) for part in state)

    def step(
        self, x: Tensor, state: State | None = None, *, reset_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One step: x (B, I), reset_mask (B,) -> reads (B, R * W) and the new state.

        Raises:
            ValueError, TypeError: x, state or reset_mask does not fit; the message says how.
        """
        name, layout = f"{type(self).__name__}.step", f"(B, {self.input_size})"
        _inputs.check_input(name, x, self.interface.weight, self.input_size, layout, (2,))
        _inputs.check_reset_mask(name, reset_mask, x)
        mask = None if reset_mask is None else reset_mask.unsqueeze(0)
        reads, state = self._checked_scan(x.unsqueeze(0), state, mask)
        return reads.squeeze(0), state

    def _state(self, parts: Any) -> State:
        return self.state_class(*parts)

    def _checked_scan(
        self, x: Tensor, state: State | None, reset_mask: Tensor | None
    ) -> tuple[Tensor, State]:
        batch = x.shape[1]
        self.check_state(state, batch, x)
        return self._scan(x, self.initial_state(batch) if state is None else state, reset_mask)

    def check_state(self, state: State | None, batch: int, x: Tensor, batched: bool = True) -> None:
        """Raises ValueError or TypeError if the state does not fit; the message says how."""
        if state is not None:
            _inputs.check_state(type(self).__name__, state, self._shapes(batch), x, batched)

    def _forward_packed(
        self, x: PackedSequence, state: State | None, reset_mask: Tensor | None
    ) -> tuple[PackedSequence, State]:
        name = type(self).__name__
        if reset_mask is not None:
            raise ValueError(
                f"{name}: reset_mask does not go with a PackedSequence; pass padded x instead"
            )
        _inputs.check_input(
            name, x.data, self.interface.weight, self.input_size,
            f"(steps in all, {self.input_size}) in the PackedSequence", (2,),
        )  # fmt: skip
        padded, lengths = pad_packed_sequence(x)
        self.check_state(state, padded.shape[1], x.data)
        if state is None:
            state = self.initial_state(padded.shape[1])
        # Sequences are cut where one ends, so that each keeps the state of its own last step.
        order = torch.argsort(lengths, descending=True, stable=True)
        ends = sorted(set(lengths.tolist()))
        current = self._state(part[order] for part in state)
        padded = padded[:, order]
        reads: list[Tensor] = []
        finished: list[State] = []
        start = 0
        for end in ends:
            alive = int((lengths >= end).sum())
            if current[0].shape[0] > alive:
                finished.append(self._state(part[alive:] for part in current))
                current = self._state(part[:alive] for part in current)
            part, current = self._checked_scan(padded[start:end, :alive], current, None)
            reads.append(nn.functional.pad(part, (0, 0, 0, padded.shape[1] - alive)))
            start = end
        finished.append(current)
        back = torch.argsort(order)
        final = self._state(
            torch.cat(parts)[back] for parts in zip(*reversed(finished), strict=True)
        )
        together = torch.cat(reads)[:, back]
        if x.sorted_indices is not None:
            together, lengths = together[:, x.sorted_indices], lengths[x.sorted_indices.cpu()]
        data = pack_padded_sequence(together, lengths).data
        packed = PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)
        return packed, final
