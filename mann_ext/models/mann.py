"""The memory-augmented network of Santoro et al. (2016): a controller around an LRUA memory."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from mann_ext.memory import LRUAMemory, LRUAState
from mann_ext.models.controllers import ControllerState, FeedForwardController, LSTMController

__all__ = ["MANN", "MANNState", "make_controller"]

ControllerName = Literal["lstm", "feedforward"]


class MANNState(NamedTuple):
    """State between calls: the controller's, the memory's, and the last reads (B, R * W)."""

    controller: ControllerState
    memory: LRUAState
    reads: Tensor

    def detach(self) -> MANNState:
        """The same values, cut off from the graph: for truncated backpropagation."""
        return MANNState(self.controller.detach(), self.memory.detach(), self.reads.detach())


torch.serialization.add_safe_globals([MANNState])


def make_controller(
    name: str, input_size: int, hidden_size: int, fused: bool | None, **factory: Any
) -> LSTMController | FeedForwardController:
    if name == "lstm":
        return LSTMController(input_size, hidden_size, fused=fused, **factory)
    if name == "feedforward":
        return FeedForwardController(input_size, hidden_size, **factory)
    raise ValueError(f"expected controller 'lstm' or 'feedforward', got {name!r}")


def check_input(model: str, x: Tensor, reset_mask: Tensor | None, input_size: int) -> None:
    if x.dim() != 3 or x.shape[-1] != input_size:
        raise ValueError(f"{model}: expected x of shape (T, B, {input_size}), got {tuple(x.shape)}")
    if reset_mask is not None and (
        reset_mask.shape != x.shape[:2] or reset_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"{model}: expected reset_mask of shape {tuple(x.shape[:2])} and dtype bool, got "
            f"{tuple(reset_mask.shape)} and {reset_mask.dtype}"
        )


class MANN(nn.Module):
    """Controller and LRUA memory: h_t from x_t, reads r_t keyed by h_t, output W [h_t, r_t] + b.

    For few-shot classification x_t is an image and the label of the image before it,
    [x_t, y_{t-1}], and the output scores the labels of x_t.

    Args:
        input_size: I.
        output_size: O.
        hidden_size: H of the controller.
        controller: "lstm" or "feedforward" (one hidden layer).
        read_feedback: also feed r_{t-1} to the controller, as the paper's main text does. It runs
            step by step; without, as in the paper's supplement, the sequence is one scan.
        fused: how the LSTM runs, see ``LSTMController``.
        device, dtype: of the parameters.
        **memory: keywords of :class:`mann_ext.LRUAMemory` (num_slots, slot_size, num_reads, ...).

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> model = MANN(405, 5, read_strength=10.0, learn_strength="per_head")
        >>> logits, state = model(torch.randn(50, 16, 405))
        >>> logits.shape
        torch.Size([50, 16, 5])
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        hidden_size: int = 200,
        *,
        controller: ControllerName = "lstm",
        read_feedback: bool = False,
        fused: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **memory: Any,
    ) -> None:
        super().__init__()
        if memory.pop("batch_first", False):
            raise ValueError("MANN: x is time first, (T, B, I); transpose it, not batch_first=True")
        factory = {"device": device, "dtype": dtype}
        self.input_size, self.output_size = input_size, output_size
        self.read_feedback = read_feedback
        self.memory = LRUAMemory(hidden_size, **memory, **factory)  # type: ignore[arg-type]
        reads = self.memory.output_size
        self.controller = make_controller(
            controller, input_size + (reads if read_feedback else 0), hidden_size, fused, **factory
        )
        self.output = nn.Linear(hidden_size + reads, output_size, **factory)  # type: ignore[arg-type]

    def initial_state(self, batch_size: int) -> MANNState:
        """The state an episode starts from."""
        reads = self.output.weight.new_zeros(batch_size, self.memory.output_size)
        return MANNState(
            self.controller.initial_state(batch_size), self.memory.initial_state(batch_size), reads
        )

    def forward(
        self, x: Tensor, state: MANNState | None = None, *, reset_mask: Tensor | None = None
    ) -> tuple[Tensor, MANNState]:
        """x (T, B, I), reset_mask (T, B) bool -> logits (T, B, O) and the last state.

        Raises:
            ValueError: x, state or reset_mask does not fit; the message says how.
        """
        check_input("MANN", x, reset_mask, self.input_size)
        if state is None:
            state = self.initial_state(x.shape[1])
        if self.read_feedback and x.shape[0] > 0:
            features, state = self._stepwise(x, state, reset_mask)
        else:
            hidden, controller = self.controller(x, state.controller, reset_mask)
            reads, memory = self.memory(hidden, state.memory, reset_mask=reset_mask)
            last = reads[-1] if x.shape[0] > 0 else state.reads
            features, state = torch.cat([hidden, reads], -1), MANNState(controller, memory, last)
        return self.output(features), state

    def _stepwise(
        self, x: Tensor, state: MANNState, reset_mask: Tensor | None
    ) -> tuple[Tensor, MANNState]:
        features = []
        fresh = None if reset_mask is None else self.initial_state(x.shape[1])
        for t in range(x.shape[0]):
            if reset_mask is not None and fresh is not None:
                state = _choose(reset_mask[t], fresh, state)
            inputs = torch.cat([x[t], state.reads], -1)
            h, controller = self.controller.step(inputs, state.controller)
            reads, memory = self.memory.step(h, state.memory)
            state = MANNState(controller, memory, reads)
            features.append(torch.cat([h, reads], -1))
        return torch.stack(features), state


def _choose(mask: Tensor, yes: MANNState, no: MANNState) -> MANNState:
    def pick(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(mask.view(-1, *[1] * (a.dim() - 1)), a, b)

    return MANNState(
        ControllerState(*map(pick, yes.controller, no.controller)),
        LRUAState(*map(pick, yes.memory, no.memory)),
        pick(yes.reads, no.reads),
    )
