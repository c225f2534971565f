"""The memory-augmented network of Santoro et al. (2016): a controller around a memory."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from mann_ext import _library
from mann_ext.memory import (
    LRUAMemory,
    LRUAMemoryTrace,
    LRUAState,
    NTMMemory,
    NTMState,
    _inputs,
)
from mann_ext.memory._module import MemoryModule
from mann_ext.models import pretrained
from mann_ext.models.controllers import ControllerState, FeedForwardController, LSTMController
from mann_ext.ops.lstm import needs_loop
from mann_ext.ops.lstm_lrua import lstm_lrua_scan
from mann_ext.reference import accumulation_dtype

__all__ = ["MANN", "MANNState", "make_controller"]

ControllerName = Literal["lstm", "feedforward"]
Addressing = Literal["lrua", "ntm"]


class MANNState(NamedTuple):
    """State between calls: the controller's, the memory's, and the last reads (B, R * W)."""

    controller: ControllerState
    memory: LRUAState | NTMState
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


def make_memory(addressing: str, input_size: int, **options: Any) -> MemoryModule[Any]:
    if addressing == "lrua":
        return LRUAMemory(input_size, **options)
    if addressing == "ntm":
        return NTMMemory(input_size, **options)
    raise ValueError(f"MANN: expected addressing 'lrua' or 'ntm', got {addressing!r}")


class MANN(nn.Module):
    """Controller and memory: h_t from x_t, reads r_t keyed by h_t, output W [h_t, r_t] + b.

    For few-shot classification x_t is an image and the label of the image before it,
    [x_t, y_{t-1}], and the output scores the labels of x_t.

    Args:
        input_size: I.
        output_size: O.
        hidden_size: H of the controller.
        controller: "lstm" or "feedforward" (one hidden layer).
        addressing: the memory, "lrua" (:class:`mann_ext.LRUAMemory`) or "ntm"
            (:class:`mann_ext.NTMMemory`; the row "MANN (NTM)" of the paper's table 2).
        read_feedback: also feed r_{t-1} to the controller, as the paper's main text does; without,
            as in the paper's supplement. With an LSTM and the LRUA it is one call for all steps
            where :func:`mann_ext.ops.lstm_lrua_scan` has a kernel; otherwise, and under autocast
            and torch.func, it runs step by step.
        fused: how the LSTM runs, see ``LSTMController``; False also for a loop over the steps of
            controller and memory where reads are fed back.
        device, dtype: of the parameters.
        **memory: the memory's keywords (num_slots, slot_size, num_reads, ...).

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
        addressing: Addressing = "lrua",
        read_feedback: bool = False,
        fused: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **memory: Any,
    ) -> None:
        super().__init__()
        if memory.pop("batch_first", False):
            raise ValueError("MANN: x is time first, (T, B, I); transpose it, not batch_first=True")
        _inputs.check_sizes(
            "MANN", input_size=input_size, output_size=output_size, hidden_size=hidden_size
        )
        factory = {"device": device, "dtype": dtype}
        self.input_size, self.output_size = input_size, output_size
        self.read_feedback = read_feedback
        self.memory = make_memory(addressing, hidden_size, **memory, **factory)
        reads = self.memory.output_size
        self.controller = make_controller(
            controller, input_size + (reads if read_feedback else 0), hidden_size, fused, **factory
        )
        self.output = nn.Linear(hidden_size + reads, output_size, **factory)  # type: ignore[arg-type]

    @classmethod
    def from_pretrained(cls, name: str) -> MANN:
        """A trained model that comes with the package, in evaluation mode; needs no network.

        "omniglot-5way": 5 Omniglot characters an episode. x_t (405,) is the 400 pixels of a 20 x 20
        image, ink 1, and the one-hot label of the image before; logits (5,). It has not seen the
        classes of ``mann_ext.data.santoro_test_classes()``. Its card is beside it.

        Raises:
            ValueError: there is no model of that name; the message lists those there are.

        Example:
            >>> model = MANN.from_pretrained("omniglot-5way")
            >>> logits, state = model(torch.zeros(50, 1, 405))
        """
        names = pretrained.names()
        if name not in names:
            raise ValueError(
                f"MANN.from_pretrained: expected one of {', '.join(names)}, got {name!r}"
            )
        parameters, metadata = pretrained.load(name)
        model = cls(**metadata["model"])
        model.load_state_dict(parameters)
        return model.eval()

    def initial_state(self, batch_size: int) -> MANNState:
        """The state an episode starts from."""
        reads = self.output.weight.new_zeros(batch_size, self.memory.output_size)
        return MANNState(
            self.controller.initial_state(batch_size), self.memory.initial_state(batch_size), reads
        )

    @overload
    def forward(
        self,
        x: Tensor,
        state: MANNState | None = None,
        *,
        reset_mask: Tensor | None = None,
        return_trace: Literal[False] = False,
    ) -> tuple[Tensor, MANNState]: ...

    @overload
    def forward(
        self,
        x: Tensor,
        state: MANNState | None = None,
        *,
        reset_mask: Tensor | None = None,
        return_trace: Literal[True],
    ) -> tuple[Tensor, MANNState, LRUAMemoryTrace]: ...

    def forward(
        self,
        x: Tensor,
        state: MANNState | None = None,
        *,
        reset_mask: Tensor | None = None,
        return_trace: bool = False,
    ) -> tuple[Tensor, MANNState] | tuple[Tensor, MANNState, LRUAMemoryTrace]:
        """x (T, B, I) -> logits (T, B, O) and the last state.

        ``reset_mask`` (T, B) bool: True starts a new episode before that step: controller, memory
        and reads as in ``initial_state``. ``return_trace``: also return what every step did to the
        memory, an :class:`mann_ext.LRUAMemoryTrace`, time first; costs as in ``LRUAMemory``.

        Raises:
            ValueError, TypeError: x, state or reset_mask does not fit; the message says how.
        """
        layout = f"(T, B, {self.input_size})"
        _inputs.check_input("MANN", x, self.output.weight, self.input_size, layout)
        _inputs.check_reset_mask("MANN", reset_mask, x)
        state = self._checked_state(state, x)
        trace = None
        if return_trace:
            if not isinstance(self.memory, LRUAMemory):
                raise ValueError("MANN: return_trace expects addressing 'lrua', got 'ntm'")
            _inputs.check_traceable("MANN", x)
        if self.read_feedback and x.shape[0] > 0:
            self.memory.check_state(state.memory, x.shape[1], x)
            if self._fuses(x, state) and not return_trace:
                features, state = self._fused(x, state, reset_mask)
            else:
                features, state, trace = self._stepwise(x, state, reset_mask, return_trace)
        elif x.shape[0] == 0:
            features = x.new_zeros(0, x.shape[1], self.output.in_features)
        else:
            hidden, controller = self.controller(x, state.controller, reset_mask)
            if return_trace:
                reads, memory, trace = self.memory(
                    hidden, state.memory, reset_mask=reset_mask, return_trace=True
                )
            else:
                reads, memory = self.memory(hidden, state.memory, reset_mask=reset_mask)
            features = torch.cat([hidden, reads], -1)
            state = MANNState(controller, memory, reads[-1])
        logits = self.output(features)
        return (logits, state) if trace is None else (logits, state, trace)

    def _checked_state(self, state: MANNState | None, x: Tensor) -> MANNState:
        """What is inside is checked by the controller and the memory."""
        batch = x.shape[1]
        if state is None:
            return self.initial_state(batch)
        if not isinstance(state, MANNState):
            raise TypeError(
                f"MANN: expected state to be a MANNState, got {type(state).__name__}; pass what "
                "initial_state or the last call returned"
            )
        shape = (batch, self.memory.output_size)
        _inputs.check_state("MANN", (state.reads,), {"reads": shape}, x)
        return state

    def _fuses(self, x: Tensor, state: MANNState) -> bool:
        """Whether the operator ``lstm_lrua_scan`` has a kernel for this call."""
        return (
            isinstance(self.controller, LSTMController)
            and isinstance(self.memory, LRUAMemory)
            and self.controller.fused is not False
            and x.dtype == accumulation_dtype(state.memory.memory.dtype)
            and not torch.is_autocast_enabled(x.device.type)
            and not needs_loop()
            and _library.use_native(x.device, "lstm_lrua_scan")
        )

    def _fused(
        self, x: Tensor, state: MANNState, reset_mask: Tensor | None
    ) -> tuple[Tensor, MANNState]:
        controller, memory = self.controller, self.memory
        assert isinstance(controller, LSTMController)
        assert isinstance(memory, LRUAMemory)
        assert isinstance(state.memory, LRUAState)
        h, c, reads, weights, usage = (
            part.to(x.dtype)
            for part in (
                *controller.checked_state(state.controller, x), state.reads, *state.memory[1:]
            )
        )  # fmt: skip
        output = lstm_lrua_scan(
            x, h, c, reads.unflatten(-1, (memory.num_reads, memory.slot_size)),
            state.memory.memory, weights, usage, *controller.weights(),
            memory.interface.weight, memory.interface.bias, memory.head_strengths(), reset_mask,
            key_activation=memory.key_activation, write_content=memory.write_content,
            strength_per_step=memory.learn_strength == "per_step", usage_decay=memory.usage_decay,
            least_used=memory.least_used, initial_value=memory.initial_value,
        )  # fmt: skip
        hidden, reads = output.hidden, output.reads.flatten(2)
        last = ControllerState(hidden[-1], output.c), LRUAState(*output[3:])
        return torch.cat([hidden, reads], -1), MANNState(*last, reads[-1])

    def _stepwise(
        self, x: Tensor, state: MANNState, reset_mask: Tensor | None, return_trace: bool
    ) -> tuple[Tensor, MANNState, LRUAMemoryTrace | None]:
        controller = self.controller.checked_state(state.controller, x)
        memory, read = state.memory, state.reads
        # The share of x in the controller's input is one product for the whole sequence.
        cell = self.controller.cell(read.shape[-1])
        features, traces = [], []
        for t, projected in enumerate(self.controller.project(x).unbind()):
            ended = None
            if reset_mask is not None:
                ended = reset_mask[t]
                controller = controller.reset(ended)
                read = read.masked_fill(ended.unsqueeze(-1), 0.0)
            h, controller = cell(projected, read, controller)
            if return_trace:
                mask = None if ended is None else ended.unsqueeze(0)
                reads, memory, step = self.memory(
                    h.unsqueeze(0), memory, reset_mask=mask, return_trace=True
                )
                read = reads.squeeze(0)
                traces.append(step)
            else:
                read, memory = self.memory.step(h, memory, reset_mask=ended)
            features.append(torch.cat([h, read], -1))
        trace = None
        if return_trace:
            trace = LRUAMemoryTrace(*(torch.cat(parts) for parts in zip(*traces, strict=True)))
        return torch.stack(features), MANNState(controller, memory, read), trace
