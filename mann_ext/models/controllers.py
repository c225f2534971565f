"""Controllers: what turns inputs into hidden states h_t, with or without a state of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mann_ext import _library
from mann_ext.memory import _inputs
from mann_ext.ops.lstm import is_resident, lstm_cell, lstm_loop, lstm_scan, needs_loop

__all__ = ["ControllerState", "FeedForwardController", "LSTMController"]


class ControllerState(NamedTuple):
    """h and c (B, H); both (B, 0) for a controller without state."""

    h: Tensor
    c: Tensor

    def detach(self) -> ControllerState:
        """The same values, cut off from the graph."""
        return ControllerState(self.h.detach(), self.c.detach())

    def reset(self, mask: Tensor) -> ControllerState:
        """Zero where ``mask`` (B,) is True, whatever was there (NaN too)."""
        ended = mask.unsqueeze(-1)
        return ControllerState(self.h.masked_fill(ended, 0.0), self.c.masked_fill(ended, 0.0))


torch.serialization.add_safe_globals([ControllerState])

# (projected inputs of one step (B, .), r_{t-1} or None, state) -> h_t and the new state.
Cell = Callable[[Tensor, "Tensor | None", ControllerState], tuple[Tensor, ControllerState]]


CUDNN_BATCH = 256
"""From here on cuDNN's products of the whole batch are expected to be quicker."""


class LSTMController(nn.Module):
    """An LSTM with the parameters of ``nn.LSTM`` and two ways to run it::

        i, f, g, o = W_ih x_t + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)

    Fused, it is one call for all steps: :func:`mann_ext.ops.lstm_scan` on the CPU, and on a GPU
    where that is one kernel launch (compute capability 9, up to 256 units in float32) for a batch
    of up to 256; elsewhere (and under autocast, or without the native operators) PyTorch's. A loop
    over plain operations is slower, but allows torch.func and forward mode; torch.compile and
    torch.export need it where PyTorch's would run, and torch.compile of vmap of grad everywhere
    (fused=False).

    Args:
        input_size: I.
        hidden_size: H.
        fused: True: always fused, an error where that is not possible; False: always the loop;
            None: fused where possible, but the loop instead of PyTorch's if most steps have a
            reset.
        device, dtype: of the parameters.

    Example:
        >>> lstm = LSTMController(6, 8)
        >>> lstm.load_state_dict(nn.LSTM(6, 8).state_dict())
        <All keys matched successfully>
        >>> hidden, state = lstm(torch.randn(5, 3, 6))
        >>> hidden.shape, state.c.shape
        (torch.Size([5, 3, 8]), torch.Size([3, 8]))
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

    def extra_repr(self) -> str:
        fused = "" if self.fused is None else f", fused={self.fused}"
        return f"{self.input_size}, {self.hidden_size}{fused}"

    def initial_state(self, batch_size: int) -> ControllerState:
        """Zero h and c."""
        zeros = self.weight_hh_l0.new_zeros(batch_size, self.hidden_size)
        return ControllerState(zeros, zeros)

    def forward(
        self, x: Tensor, state: ControllerState | None = None, reset_mask: Tensor | None = None
    ) -> tuple[Tensor, ControllerState]:
        """x (T, B, I) -> h (T, B, H) and the last state.

        ``reset_mask`` (T, B) bool: True zeroes the state before that step.

        Raises:
            ValueError, TypeError: x, state or reset_mask does not fit; the message says how.
        """
        layout = f"(T, B, {self.input_size})"
        _inputs.check_input("LSTMController", x, self.weight_ih_l0, self.input_size, layout)
        _inputs.check_reset_mask("LSTMController", reset_mask, x)
        state = self.checked_state(state, x)
        native = self._native(x)
        possible = not (needs_loop() or (torch.compiler.is_compiling() and not native))
        if self.fused and not possible:
            raise RuntimeError(
                "LSTMController: the fused LSTM does not run under torch.func or forward mode, and "
                "under torch.compile or torch.export only as the native operator; use fused=None "
                "(the loop where it is needed) or False"
            )
        fused = possible if self.fused is None else self.fused
        if fused and native:
            h, c = (part.to(x.dtype) for part in state)
            hidden, h, c = lstm_scan(x, h, c, *self.weights(), reset_mask)
            return hidden, ControllerState(h, c)
        if fused and x.numel() > 0:
            cuts = [] if reset_mask is None else reset_mask.any(1).nonzero().flatten().tolist()
            # Each cut costs a call; where there are many the loop is no slower.
            if self.fused or 4 * len(cuts) <= x.shape[0]:
                return self._fused_pieces(x, state, reset_mask, cuts)
        hidden, h, c = lstm_loop(x, *state, *self.weights(), reset_mask)
        return hidden, ControllerState(h, c)

    def _native(self, x: Tensor) -> bool:
        """Whether ``lstm_scan`` has a kernel for this call; on a GPU, a quicker one than cuDNN."""
        possible = (
            x.device.type in ("cpu", "cuda")
            and x.dtype in (torch.float32, torch.float64)
            and not torch.is_autocast_enabled(x.device.type)
            and _library.use_native(x.device, "lstm_scan")
        )
        if not possible or x.device.type == "cpu":
            return possible
        return x.shape[1] <= CUDNN_BATCH and is_resident(x, self.hidden_size)

    def step(
        self, x: Tensor, state: ControllerState | None = None
    ) -> tuple[Tensor, ControllerState]:
        """x (B, I) -> h (B, H) and the new state."""
        layout = f"(B, {self.input_size})"
        _inputs.check_input("LSTMController", x, self.weight_ih_l0, self.input_size, layout, (2,))
        state = self.checked_state(state, x)
        return self.cell(0)(self.project(x), None, state)

    def checked_state(self, state: ControllerState | None, x: Tensor) -> ControllerState:
        """The state, or the initial one; PyTorch's fused LSTM does not check, and crashes."""
        batch = x.shape[-2]
        if state is None:
            return self.initial_state(batch)
        shape = (batch, self.hidden_size)
        _inputs.check_state("LSTMController", state, {"h": shape, "c": shape}, x)
        return state

    def project(self, x: Tensor) -> Tensor:
        """x (..., at most I) -> its share of the gates (..., 4H), biases included."""
        weight = self.weight_ih_l0[:, : x.shape[-1]]
        return F.linear(x, weight, self.bias_ih_l0 + self.bias_hh_l0)

    def cell(self, fed_back: int) -> Cell:
        """One step after :meth:`project`, the last ``fed_back`` inputs coming from r_{t-1}."""
        weight = self.weight_hh_l0
        if fed_back:  # one product a step for h_{t-1} and r_{t-1} together
            weight = torch.cat([weight, self.weight_ih_l0[:, -fed_back:]], 1)
        transposed = weight.t()

        def run(
            projected: Tensor, reads: Tensor | None, state: ControllerState
        ) -> tuple[Tensor, ControllerState]:
            inner = state.h if reads is None else torch.cat([state.h, reads], -1)
            h, c = lstm_cell(projected, inner, state.c, transposed)
            return h, ControllerState(h, c)

        return run

    def _fused_pieces(
        self, x: Tensor, state: ControllerState, reset_mask: Tensor | None, cuts: list[int]
    ) -> tuple[Tensor, ControllerState]:
        bounds = [0, *[t for t in cuts if t > 0], x.shape[0]]
        pieces = []
        for start, end in itertools.pairwise(bounds):
            if reset_mask is not None and start in cuts:
                state = state.reset(reset_mask[start])
            h, c = (part.to(x.dtype) for part in state)
            piece, h, c = _FusedLSTM.apply(x[start:end], h, c, *self.weights())
            state = ControllerState(h, c)
            pieces.append(piece)
        return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)), state

    def weights(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """W_ih, W_hh, b_ih and b_hh."""
        return self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0


class _FusedLSTM(torch.autograd.Function):
    """PyTorch's fused LSTM; its second derivatives, which that lacks, come from the loop."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*inputs)
        wanted = ctx.needs_input_grad
        with torch.set_grad_enabled(any(wanted)):
            ctx.copies = [x.detach().requires_grad_(w) for x, w in zip(inputs, wanted, strict=True)]
            x, h, c, *weights = ctx.copies
            hidden, h, c = torch._VF.lstm(
                x, (h.unsqueeze(0), c.unsqueeze(0)), weights,
                True, 1, 0.0, any(wanted), False, False,
            )  # fmt: skip
            ctx.outputs = (hidden, h.squeeze(0), c.squeeze(0))
        return tuple(output.detach() for output in ctx.outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # Not autograd.grad of the loop: h may depend on the weights, and that path is not ours.
            gradients: tuple[Tensor, ...] = torch.func.vjp(lstm_loop, *ctx.saved_tensors)[1](grads)
            return gradients
        wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
        found = torch.autograd.grad(
            ctx.outputs, [ctx.copies[i] for i in wanted], grads, retain_graph=True
        )
        result: list[Tensor | None] = [None] * len(ctx.copies)
        for i, grad in zip(wanted, found, strict=True):
            result[i] = grad
        return tuple(result)


class FeedForwardController(nn.Module):
    """One hidden layer, h_t = relu(W x_t + b), and no state.

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

    def reset_parameters(self) -> None:
        """As ``nn.Linear``."""
        self.layer.reset_parameters()

    def initial_state(self, batch_size: int) -> ControllerState:
        """Two empty tensors (B, 0)."""
        empty = self.layer.weight.new_zeros(batch_size, 0)
        return ControllerState(empty, empty)

    def forward(
        self, x: Tensor, state: ControllerState | None = None, reset_mask: Tensor | None = None
    ) -> tuple[Tensor, ControllerState]:
        """x (T, B, I) -> h (T, B, H); there is nothing to reset.

        Raises:
            ValueError, TypeError: x, state or reset_mask does not fit; the message says how.
        """
        name, layout = "FeedForwardController", f"(T, B, {self.input_size})"
        _inputs.check_input(name, x, self.layer.weight, self.input_size, layout)
        _inputs.check_reset_mask(name, reset_mask, x)
        return self.layer(x).relu(), self.checked_state(state, x)

    def step(
        self, x: Tensor, state: ControllerState | None = None
    ) -> tuple[Tensor, ControllerState]:
        """x (B, I) -> h (B, H)."""
        name, layout = "FeedForwardController", f"(B, {self.input_size})"
        _inputs.check_input(name, x, self.layer.weight, self.input_size, layout, (2,))
        return self.layer(x).relu(), self.checked_state(state, x)

    def project(self, x: Tensor) -> Tensor:
        """x (..., at most I) -> its share of W x + b (..., H)."""
        return F.linear(x, self.layer.weight[:, : x.shape[-1]], self.layer.bias)

    def cell(self, fed_back: int) -> Cell:
        """One step after :meth:`project`, the last ``fed_back`` inputs coming from r_{t-1}."""
        transposed = self.layer.weight[:, self.input_size - fed_back :].t()

        def run(
            projected: Tensor, reads: Tensor | None, state: ControllerState
        ) -> tuple[Tensor, ControllerState]:
            total = projected if reads is None else torch.addmm(projected, reads, transposed)
            return total.relu(), state

        return run

    def checked_state(self, state: ControllerState | None, x: Tensor) -> ControllerState:
        """The state, or the initial one."""
        if state is None:
            return self.initial_state(x.shape[-2])
        shape = (x.shape[-2], 0)
        _inputs.check_state("FeedForwardController", state, {"h": shape, "c": shape}, x)
        return state
