"""The paper's baselines, with the interface of MANN: no external memory."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mann_ext.memory import _inputs
from mann_ext.models.controllers import ControllerState
from mann_ext.models.mann import make_controller

__all__ = ["LSTM", "FeedForward"]


class _Baseline(nn.Module):
    kind = ""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        hidden_size: int = 200,
        *,
        fused: bool | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _inputs.check_sizes(
            type(self).__name__, input_size=input_size, output_size=output_size,
            hidden_size=hidden_size,
        )  # fmt: skip
        self.input_size, self.output_size = input_size, output_size
        self.controller = make_controller(
            self.kind, input_size, hidden_size, fused, device=device, dtype=dtype
        )
        self.output = nn.Linear(hidden_size, output_size, device=device, dtype=dtype)

    def initial_state(self, batch_size: int) -> ControllerState:
        """The state an episode starts from."""
        return self.controller.initial_state(batch_size)

    def forward(
        self, x: Tensor, state: ControllerState | None = None, *, reset_mask: Tensor | None = None
    ) -> tuple[Tensor, ControllerState]:
        """x (T, B, I) -> logits (T, B, O) and the state after the last step.

        Raises:
            ValueError, TypeError: x, state or reset_mask does not fit; the message says how.
        """
        name, layout = type(self).__name__, f"(T, B, {self.input_size})"
        _inputs.check_input(name, x, self.output.weight, self.input_size, layout)
        _inputs.check_reset_mask(name, reset_mask, x)
        hidden, state = self.controller(x, state, reset_mask)
        return self.output(hidden), state


class LSTM(_Baseline):
    """An LSTM and a linear output: all it can remember is in its own state.

    Args:
        input_size: I.
        output_size: O.
        hidden_size: H.
        fused: how the LSTM runs, see ``LSTMController``.
        device, dtype: of the parameters.
    """

    kind = "lstm"


class FeedForward(_Baseline):
    """One hidden layer and a linear output, each step by itself.

    Args:
        input_size: I.
        output_size: O.
        hidden_size: H.
        device, dtype: of the parameters.
    """

    kind = "feedforward"
