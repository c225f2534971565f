"""Controllers: what turns inputs into hidden states h_t, with or without a state of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["ControllerState", "FeedForwardController", "LSTMController"]


class ControllerState(NamedTuple):
    """h and c (B, H); both (B, 0) for a controller without state."""

    h: Tensor
    c: Tensor

    def detach(self) -> ControllerState:
        """The same values, cut off from the graph."""
        return ControllerState(*(part.detach() for part in self))


torch.serialization.add_safe_globals([ControllerState])


def _transformed() -> bool:
    """Whether torch.compile or a torch.func transform is at work: the fused LSTM allows neither."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


class LSTMController(nn.Module):
    """An LSTM with the parameters of ``nn.LSTM`` and two ways to run it.

    PyTorch's fused LSTM is the faster, but breaks torch.compile, torch.export, torch.func and
    double backward; a loop over plain operations allows them all.

    Args:
        input_size: I.
        hidden_size: H.
        fused: True: always PyTorch's fused LSTM; False: always the loop (double backward needs it);
            None: fused unless torch.compile, torch.func or a reset mask forbids it.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        fused: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size, self.fused = input_size, hidden_size, fused
        # The parameters themselves, not an nn.LSTM: torch.compile refuses to look at that module.
        factory = {"device": device, "dtype": dtype}
        for part, width in (("ih", input_size), ("hh", hidden_size)):
            weight = torch.empty(4 * hidden_size, width, **factory)  # type: ignore[arg-type]
            bias = torch.empty(4 * hidden_size, **factory)  # type: ignore[arg-type]
            self.register_parameter(f"weight_{part}_l0", nn.Parameter(weight))
            self.register_parameter(f"bias_{part}_l0", nn.Parameter(bias))
        self.reset_parameters()

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def reset_parameters(self) -> None:
        """U(-1/sqrt(H), 1/sqrt(H)), as ``nn.LSTM``."""
        bound = self.hidden_size**-0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def initial_state(self, batch_size: int) -> ControllerState:
        """Zero h and c."""
        zeros = self.weight_hh_l0.new_zeros(batch_size, self.hidden_size)
        return ControllerState(zeros, zeros)

    def forward(
        self, x: Tensor, state: ControllerState, reset_mask: Tensor | None = None
    ) -> tuple[Tensor, ControllerState]:
        """x (T, B, I) -> h (T, B, H) and the last state; ``reset_mask`` (T, B) zeroes it first."""
        fused = not _transformed() if self.fused is None else self.fused
        if fused and reset_mask is None and x.shape[0] > 0 and x.shape[1] > 0:
            weights = [self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0]
            hidden, h, c = torch._VF.lstm(
                x, (state.h.unsqueeze(0), state.c.unsqueeze(0)), weights,
                True, 1, 0.0, self.training, False, False,
            )  # fmt: skip
            return hidden, ControllerState(h.squeeze(0), c.squeeze(0))
        projected = nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0)
        outputs = []
        for t in range(x.shape[0]):
            if reset_mask is not None:
                keep = (~reset_mask[t]).unsqueeze(-1).to(x.dtype)
                state = ControllerState(state.h * keep, state.c * keep)
            state = self._cell(projected[t], state)
            outputs.append(state.h)
        if not outputs:
            return x.new_zeros(0, x.shape[1], self.hidden_size), state
        return torch.stack(outputs), state

    def step(self, x: Tensor, state: ControllerState) -> tuple[Tensor, ControllerState]:
        """x (B, I) -> h (B, H) and the new state."""
        state = self._cell(nn.functional.linear(x, self.weight_ih_l0, self.bias_ih_l0), state)
        return state.h, state

    def _cell(self, projected: Tensor, state: ControllerState) -> ControllerState:
        gates = projected + nn.functional.linear(state.h, self.weight_hh_l0, self.bias_hh_l0)
        i, f, g, o = gates.chunk(4, -1)
        c = f.sigmoid() * state.c + i.sigmoid() * g.tanh()
        return ControllerState(o.sigmoid() * c.tanh(), c)


class FeedForwardController(nn.Module):
    """One hidden layer, h = relu(W x + b), and no state.

    Args:
        input_size: I.
        hidden_size: H.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size, self.hidden_size = input_size, hidden_size
        self.layer = nn.Linear(input_size, hidden_size, device=device, dtype=dtype)

    def initial_state(self, batch_size: int) -> ControllerState:
        """Two empty tensors (B, 0)."""
        empty = self.layer.weight.new_zeros(batch_size, 0)
        return ControllerState(empty, empty)

    def forward(
        self, x: Tensor, state: ControllerState, reset_mask: Tensor | None = None
    ) -> tuple[Tensor, ControllerState]:
        """x (T, B, I) -> h (T, B, H)."""
        return self.layer(x).relu(), state

    def step(self, x: Tensor, state: ControllerState) -> tuple[Tensor, ControllerState]:
        """x (B, I) -> h (B, H)."""
        return self.layer(x).relu(), state
