"""An LSTM and the LRUA memory that it reads, fed back step by step (``lstm_lrua_scan``)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from mann_ext import _library, reference
from mann_ext.ops import _common
from mann_ext.ops.lrua import HISTORY_BUDGET, MAX_HEADS, LeastUsed, check_options, padded
from mann_ext.ops.lstm import needs_loop

__all__ = ["LSTMLRUAScanOutput", "lstm_lrua_scan"]

KeyActivation = Literal["none", "tanh"]


class LSTMLRUAScanOutput(NamedTuple):
    """h_t (T, B, H) and r_t (T, B, R, W) of every step, and the rest of the state after the last.

    The state's h and r are ``hidden[-1]`` and ``reads[-1]``.
    """

    hidden: Tensor
    reads: Tensor
    c: Tensor
    memory: Tensor
    read_weights: Tensor
    usage: Tensor


def lstm_lrua_scan(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    reads: Tensor,
    memory: Tensor,
    read_weights: Tensor,
    usage: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Tensor,
    bias_hh: Tensor,
    interface_weight: Tensor,
    interface_bias: Tensor,
    strengths: Tensor | None = None,
    reset: Tensor | None = None,
    *,
    key_activation: KeyActivation = "none",
    write_content: bool = False,
    strength_per_step: bool = False,
    usage_decay: float = 0.99,
    least_used: LeastUsed = "per_head",
    eps: float = 1e-8,
    initial_value: float = 1e-6,
    history_budget: int | None = None,
    snapshot_every: int | None = None,
) -> LSTMLRUAScanOutput:
    """T steps of an LSTM whose memory's last reads go into its gates (Santoro et al., 2016).

    Each step::

        i, f, g, o = W_ih [x_t, r_{t-1}] + b_ih + W_hh h_{t-1} + b_hh
        c_t = sigmoid(f) c_{t-1} + sigmoid(i) tanh(g)        h_t = sigmoid(o) tanh(c_t)
        k_t, a_t, gate_t, beta_t = W_interface h_t + b_interface
        r_t = one step of lrua_scan(k_t, sigmoid(gate_t), softplus(beta_t), a_t)

    Contents a_t and strengths beta_t are there where asked for; keys and contents go through tanh
    if ``key_activation`` says so. The native kernel computes no gradient for an ``x`` that needs
    none. Under torch.func and in forward mode the steps run in plain operations.

    Args:
        x: (T, B, I), float64 with a float64 memory, else float32. All else but the memory has its
            dtype.
        h, c: (B, H), the LSTM's state before the first step.
        reads: (B, R, W), of the step before the first.
        memory, read_weights, usage: the memory's state, as for :func:`lrua_scan`.
        weight_ih: (4H, I + R W).
        weight_hh: (4H, H).
        bias_ih, bias_hh: (4H,).
        interface_weight: (P, H), P the sum of R W for the keys, R W for the contents if any, R for
            the gates, and R for the strengths if they are made every step; in this order.
        interface_bias: (P,).
        strengths: (R,), the beta of every step; None: 1.
        reset: (T, B) bool: where True h, c and reads are zero before step t, and the memory's state
            is as ``lrua_scan`` says.
        key_activation: "none" or "tanh".
        write_content: the contents are made apart from the keys.
        strength_per_step: the strengths are made every step.
        usage_decay, least_used, eps, initial_value: as for ``lrua_scan``.
        history_budget, snapshot_every: as for ``lrua_scan``.

    Returns:
        h_t and r_t of every step, and c and the memory's state after the last.

    Raises:
        ValueError, TypeError: a shape, device, dtype or option does not fit; the message says.

    Example:
        >>> import torch
        >>> from mann_ext.ops import lstm_lrua_scan
        >>> from mann_ext.reference import fresh_state
        >>> memory = fresh_state(3, 2, 20, 6, 1e-6, torch.float32, torch.device("cpu"))
        >>> h, reads = torch.zeros(3, 8), torch.zeros(3, 2, 6)
        >>> lstm, interface = torch.nn.LSTM(7 + 2 * 6, 8), torch.nn.Linear(8, 2 * 6 + 2)
        >>> weights = [*lstm.parameters(), *interface.parameters()]
        >>> output = lstm_lrua_scan(torch.randn(5, 3, 7), h, h, reads, *memory, *weights)
        >>> output.hidden.shape, output.reads.shape
        (torch.Size([5, 3, 8]), torch.Size([5, 3, 2, 6]))
    """
    _check(
        x, h, c, reads, memory, read_weights, usage, weight_ih, weight_hh, bias_ih, bias_hh,
        interface_weight, interface_bias, strengths, reset, key_activation, write_content,
        strength_per_step,
    )  # fmt: skip
    check_options("lstm_lrua_scan", usage_decay, least_used, eps, snapshot_every)
    inputs = (
        x, h, c, reads, memory, read_weights, usage, weight_ih, weight_hh, bias_ih, bias_hh,
        interface_weight, interface_bias, strengths,
    )  # fmt: skip
    if needs_loop() or not _library.use_native(x.device, "lstm_lrua_scan"):
        with _common.without_autocast(x.device):
            output = reference.lstm_lrua_scan(
                *inputs, reset, key_activation=key_activation, write_content=write_content,
                strength_per_step=strength_per_step, usage_decay=usage_decay,
                least_used=least_used, eps=eps, initial_value=initial_value,
            )  # fmt: skip
        return LSTMLRUAScanOutput(*output[:6])
    save = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in inputs
    )
    # The memory may have any strides.
    arguments = [tensor if i == 4 else _contiguous(tensor) for i, tensor in enumerate(inputs)]
    if torch.compiler.is_compiling():
        # It does not always see what torch.func.grad differentiates, and refuses one tensor given
        # twice, as h and c may be.
        save = torch.is_grad_enabled()
        arguments = [None if a is None else a.view_as(a) for a in arguments]
    if snapshot_every is None:
        budget = HISTORY_BUDGET if history_budget is None else history_budget
        numbers = x.shape[0] * memory.shape[0] * padded(memory.shape[1]) * memory.shape[2]
        snapshot_every = 1 if numbers * memory.element_size() <= budget else 0
    with _common.without_autocast(x.device):  # on a GPU some of the products are PyTorch's
        output = _Scan.apply(
            *arguments, _contiguous(reset), key_activation == "tanh", write_content,
            strength_per_step, float(usage_decay), least_used == "shared", float(eps),
            float(initial_value), int(snapshot_every), save,
        )  # fmt: skip
    return LSTMLRUAScanOutput(*output[:6])


def _check(
    x: Tensor, h: Tensor, c: Tensor, reads: Tensor, memory: Tensor, read_weights: Tensor,
    usage: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor,
    interface_weight: Tensor, interface_bias: Tensor, strengths: Tensor | None,
    reset: Tensor | None, key_activation: str, write_content: bool,
    strength_per_step: bool,
) -> None:  # fmt: skip
    op = "lstm_lrua_scan"
    others = {
        "h": h, "c": c, "reads": reads, "read_weights": read_weights, "usage": usage,
        "weight_ih": weight_ih, "weight_hh": weight_hh, "bias_ih": bias_ih, "bias_hh": bias_hh,
        "interface_weight": interface_weight, "interface_bias": interface_bias,
    }  # fmt: skip
    for name, tensor in {"x": x, "memory": memory, **others}.items():
        if tensor is None:
            raise TypeError(f"{op}: expected {name} to be a torch.Tensor, got None")
    optional = {"strengths": strengths, "reset": reset}
    _common.check_tensors(op, x=x, memory=memory, **others, **optional)
    _common.check_memory_dtype(op, "memory", memory)
    _common.check_shape(op, "memory", memory, ("B", "N", "W"))
    batch, slots, width = memory.shape
    _common.check_shape(op, "h", h, (batch, "H"), memory=memory)
    _common.check_shape(op, "reads", reads, (batch, "R", width), memory=memory)
    _common.check_shape(op, "x", x, ("T", batch, "I"), memory=memory)
    inputs, hidden, heads = x.shape[2], h.shape[1], reads.shape[1]
    if min(slots, width, heads, inputs, hidden) < 1:
        raise ValueError(
            f"{op}: expected at least one slot, head and column, got {slots} slots, {heads} heads, "
            f"width {width}, {inputs} columns of x and {hidden} of h"
        )
    if heads > MAX_HEADS:
        raise ValueError(f"{op}: expected at most {MAX_HEADS} heads, got {heads}")
    if key_activation not in ("none", "tanh"):
        raise ValueError(f"{op}: expected key_activation 'none' or 'tanh', got {key_activation!r}")
    if strengths is not None and strength_per_step:
        raise ValueError(
            f"{op}: expected strengths None with strength_per_step, which makes them from h; drop "
            "one of the two"
        )
    numbers = heads * width * (1 + write_content) + heads * (1 + strength_per_step)
    options = f"write_content={write_content} and strength_per_step={strength_per_step}"
    _common.check_shape(op, "c", c, (batch, hidden), h=h)
    _common.check_shape(op, "read_weights", read_weights, (batch, heads, slots), reads=reads)
    _common.check_shape(op, "usage", usage, (batch, slots), memory=memory)
    _common.check_shape(
        op, "weight_ih", weight_ih, (4 * hidden, inputs + heads * width), x=x, h=h, reads=reads
    )
    _common.check_shape(op, "weight_hh", weight_hh, (4 * hidden, hidden), h=h)
    _common.check_shape(op, "bias_ih", bias_ih, (4 * hidden,), h=h)
    _common.check_shape(op, "bias_hh", bias_hh, (4 * hidden,), h=h)
    _common.check_shape(
        op, "interface_weight", interface_weight, (numbers, hidden), h=h, reads=reads,
        options=options,
    )  # fmt: skip
    _common.check_shape(
        op, "interface_bias", interface_bias, (numbers,), interface_weight=interface_weight
    )
    if strengths is not None:
        _common.check_shape(op, "strengths", strengths, (heads,), reads=reads)
        others["strengths"] = strengths
    acc = reference.accumulation_dtype(memory.dtype)
    for name, tensor in {"x": x, **others}.items():
        if tensor.dtype != acc:
            raise TypeError(
                f"{op}: expected {name} of dtype {acc} with a memory of dtype {memory.dtype}, got "
                f"{tensor.dtype}; convert it with .to({acc})"
            )
    if reset is not None:
        _common.check_shape(op, "reset", reset, x.shape[:2], x=x)
        if reset.dtype != torch.bool:
            raise TypeError(
                f"{op}: expected reset of dtype bool, got {reset.dtype}; use reset.bool()"
            )
    _common.check_same_device(op, memory, x=x, **others, reset=reset)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


class _Scan(torch.autograd.Function):
    """The raw operator; its outputs after the first five are not differentiable."""

    @staticmethod
    def forward(
        x: Any, h: Any, c: Any, reads: Any, memory: Any, read_weights: Any, usage: Any,
        weight_ih: Any, weight_hh: Any, bias_ih: Any, bias_hh: Any, interface_weight: Any,
        interface_bias: Any, strengths: Any, reset: Any, tanh_keys: bool, write_content: bool,
        strength_per_step: bool, usage_decay: float, shared: bool, eps: float,
        initial_value: float, snapshot_every: int, save_for_backward: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.lstm_lrua_scan(
            x, h, c, reads, memory, read_weights, usage, weight_ih, weight_hh, bias_ih, bias_hh,
            interface_weight, interface_bias, strengths, reset, tanh_keys, write_content,
            strength_per_step, usage_decay, shared, eps, initial_value, snapshot_every,
            save_for_backward,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        state, weights_and_reset = inputs[:6], inputs[7:15]
        tanh_keys, write_content, strength_per_step, _, *rest = inputs[15:23]
        ctx.options = (tanh_keys, write_content, strength_per_step, *rest)
        hidden, all_reads, _, memory_out, _, usage_out, *history = output
        ctx.mark_non_differentiable(usage_out, *history)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            *state, *weights_and_reset, hidden, all_reads, memory_out, *history
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        need_x, need_memory, need_strengths = (ctx.needs_input_grad[i] for i in (0, 4, 13))
        saved = ctx.saved_tensors
        with _common.without_autocast(saved[0].device):
            found = _ScanBackward.apply(
                *map(_contiguous, grads[:5]), *saved, *ctx.options, need_x, need_memory
            )
        x, h, c, reads, memory, read_weights, weight_ih, weight_hh, bias, *rest = found
        *interface, strengths = rest
        return (
            x if need_x else None, h, c, reads, memory if need_memory else None, read_weights, None,
            weight_ih, weight_hh, bias, bias, *interface, strengths if need_strengths else None,
            *[None] * 10,
        )  # fmt: skip


class _ScanBackward(torch.autograd.Function):
    """The hand-written backward pass; its own derivative recomputes through the reference."""

    @staticmethod
    def forward(
        grad_hidden: Any, grad_reads: Any, grad_c: Any, grad_memory: Any, grad_read_weights: Any,
        x: Any, h: Any, c: Any, reads: Any, memory: Any, read_weights: Any, weight_ih: Any,
        weight_hh: Any, bias_ih: Any, bias_hh: Any, interface_weight: Any, interface_bias: Any,
        strengths: Any, reset: Any, hidden: Any, all_reads: Any, memory_out: Any, gates: Any,
        cells: Any, keys: Any, write_gates: Any, step_strengths: Any, contents: Any,
        weight_history: Any, slot_history: Any, erased_rows: Any, snapshots: Any, tanh_keys: bool,
        write_content: bool, strength_per_step: bool, shared: bool, eps: float,
        initial_value: float, snapshot_every: int, need_x_grad: bool, need_memory_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.ops.mann_ext.lstm_lrua_scan_backward(
            grad_hidden, grad_reads, grad_c, grad_memory, grad_read_weights, x, h, c, reads,
            memory, read_weights, weight_ih, weight_hh, interface_weight, strengths, reset, hidden,
            all_reads, memory_out, gates, cells, keys, write_gates, step_strengths, contents,
            weight_history, slot_history, erased_rows, snapshots, tanh_keys, write_content,
            strength_per_step, shared, eps, initial_value, snapshot_every, need_x_grad,
            need_memory_grad,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # Gradients, what can be differentiated, reset; slot_history.
        ctx.save_for_backward(*inputs[:19], inputs[29])
        ctx.options = inputs[32:38]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        *inputs, reset, slots = ctx.saved_tensors
        tanh_keys, write_content, strength_per_step, shared, eps, initial_value = ctx.options
        present = [i for i, x in enumerate(inputs) if x is not None]
        primals = [i for i in present if i >= 5]
        run: Any = partial(
            reference.lstm_lrua_scan, reset=reset, key_activation="tanh" if tanh_keys else "none",
            write_content=write_content, strength_per_step=strength_per_step,
            least_used="shared" if shared else "per_head", eps=eps, initial_value=initial_value,
            slots=slots,
        )  # fmt: skip

        def scan(*values: Tensor) -> tuple[Tensor, ...]:
            full = dict(zip(primals, values, strict=True))
            usage = full[9].new_zeros(full[9].shape[:2], dtype=full[5].dtype)
            # As for the first derivative, slots are forced and the usage has no part in it.
            state, weights = [full[i] for i in range(5, 11)], [full.get(i) for i in range(11, 18)]
            return run(*state, usage, *weights)[:5]

        def first_order(*values: Tensor) -> tuple[Tensor, ...]:
            full = dict(zip(present, values, strict=True))
            outputs, pullback = torch.func.vjp(scan, *(full[i] for i in primals))[:2]
            found = pullback(
                tuple(full.get(i, torch.zeros_like(out)) for i, out in enumerate(outputs))
            )
            return *found[:9], *found[10:]  # the second bias has the gradient of the first

        results, pullback = torch.func.vjp(first_order, *(inputs[i] for i in present))[:2]
        cotangents = tuple(
            torch.zeros_like(result) if grad is None or grad.shape != result.shape else grad
            for grad, result in zip(grads, results, strict=False)  # no strengths, no gradient
        )
        out: list[Tensor | None] = [None] * 41
        for i, grad in zip(present, pullback(cotangents), strict=True):
            out[i] = grad
        return tuple(out)


def _scan_fake(
    x: Tensor, h: Tensor, c: Tensor, reads: Tensor, memory: Tensor, read_weights: Tensor,
    usage: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias_ih: Tensor, bias_hh: Tensor,
    interface_weight: Tensor, interface_bias: Tensor, strengths: Tensor | None,
    reset: Tensor | None, tanh_keys: bool, write_content: bool, strength_per_step: bool,
    usage_decay: float, shared: bool, eps: float, initial_value: float, snapshot_every: int,
    save_for_backward: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    (steps, batch, _), hidden = x.shape, h.shape[1]
    (_, slots, width), heads = memory.shape, reads.shape[1]
    chosen, stored, new = min(heads, slots), memory.new_empty, x.new_empty
    history = [*(new(0) for _ in range(7)), stored(0, dtype=torch.long), stored(0), stored(0)]
    if save_for_backward:
        saved = steps // snapshot_every if snapshot_every > 0 else 0
        vectors, scalars = (steps, batch, heads, width), (steps, batch, heads)
        history = [
            new(steps, batch, 4 * hidden),
            new(steps, batch, hidden),
            new(vectors),
            new(scalars),
            new(scalars) if strengths is not None or strength_per_step else new(0),
            new(vectors) if write_content else new(0),
            new(steps, batch, heads, padded(slots)),
            stored((steps, batch, chosen), dtype=torch.long),
            stored(0) if snapshot_every == 1 else stored(steps, batch, chosen, width),
            stored(saved, batch, padded(slots) * width),
        ]
    return (
        new(steps, batch, hidden), new(steps, batch, heads, width), torch.empty_like(c),
        stored(batch, slots, width), torch.empty_like(read_weights), torch.empty_like(usage),
        *history,
    )  # fmt: skip


def _scan_backward_fake(
    grad_hidden: Tensor | None, grad_reads: Tensor | None, grad_c: Tensor | None,
    grad_memory: Tensor | None, grad_read_weights: Tensor | None, x: Tensor, h: Tensor, c: Tensor,
    reads: Tensor, memory: Tensor, read_weights: Tensor, weight_ih: Tensor, weight_hh: Tensor,
    interface_weight: Tensor, strengths: Tensor | None, reset: Tensor | None, hidden: Tensor,
    all_reads: Tensor, memory_out: Tensor, gates: Tensor, cells: Tensor, keys: Tensor,
    write_gates: Tensor, step_strengths: Tensor, contents: Tensor, weight_history: Tensor,
    slot_history: Tensor, erased_rows: Tensor, snapshots: Tensor, tanh_keys: bool,
    write_content: bool, strength_per_step: bool, shared: bool, eps: float, initial_value: float,
    snapshot_every: int, need_x_grad: bool, need_memory_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        torch.empty_like(x) if need_x_grad else x.new_empty(0),
        *map(torch.empty_like, (h, c, reads)),
        memory.new_empty(memory.shape if need_memory_grad else (0,)),
        *map(torch.empty_like, (read_weights, weight_ih, weight_hh)),
        x.new_empty(weight_ih.shape[0]), torch.empty_like(interface_weight),
        x.new_empty(interface_weight.shape[0]),
        h.new_empty(0) if strengths is None else torch.empty_like(strengths),
    )  # fmt: skip


if _library.native_available():
    torch.library.register_fake("mann_ext::lstm_lrua_scan")(_scan_fake)
    torch.library.register_fake("mann_ext::lstm_lrua_scan_backward")(_scan_backward_fake)
