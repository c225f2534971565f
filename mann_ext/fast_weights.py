"""Fast weights: layers augmented by weights made for a task or an example, and what makes them.

A layer with slow weights W and fast weights W* computes f(W x) + f(W* x) (layer augmentation,
Munkhdalai and Yu, 2017). Fast weights are made from gradients by meta learners that treat every
coordinate alike, so one learner serves layers of any size and networks of any shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mann_ext.ops.coordinate_lstm import coordinate_lstm
from mann_ext.ops.relu_pool import relu_pool
from mann_ext.reference import gradient_features

__all__ = [
    "CoordinateLSTM",
    "CoordinateMLP",
    "FastConv2d",
    "FastLinear",
    "FastSequential",
    "MetaLearner",
    "example_gradients",
    "preprocess_gradients",
]

Activation = Literal["relu"] | None

CELLS = 4096
"""Of the table in which m finds the line of a coordinate."""


class FastLinear(nn.Linear):
    """A linear layer that fast weights augment: f(W x + b) + sum_k f(W*_k x).

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        activation: f, "relu" or None for the identity.

    Example:
        >>> layer = FastLinear(6, 4, bias=False)
        >>> x = torch.randn(3, 6)
        >>> layer(x, torch.randn(4, 6), torch.randn(3, 4, 6)).shape  # for all, and one an example
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: Activation = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self.activation = _checked_activation("FastLinear", activation)

    def forward(self, x: Tensor, *fast: Tensor) -> Tensor:
        """x (B, I) and fast weights, each (O, I) for all or (B, O, I) one an example -> (B, O).

        Raises:
            ValueError: fast weights of another shape.
        """
        return _combine(self.parts(x, *fast), self.activation)

    def parts(self, x: Tensor, *fast: Tensor) -> list[Tensor]:
        """What the activation is applied to: by the slow weights, and by each fast one."""
        parts = [F.linear(x, self.weight, self.bias)]
        for weight in fast:
            if _is_shared("FastLinear", weight, self.weight, x):
                parts.append(F.linear(x, weight))
            else:
                parts.append(torch.bmm(weight, x.unsqueeze(-1)).squeeze(-1))
        return parts

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class FastConv2d(nn.Conv2d):
    """A convolution that fast weights augment: f(W * x + b) + sum_k f(W*_k * x).

    Fast weights of a whole batch, one filter bank an example, are one grouped convolution.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, bias, device, dtype: as
            for ``nn.Conv2d``.
        activation: f, "relu" or None for the identity.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        activation: Activation = "relu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, bias=bias,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.activation = _checked_activation("FastConv2d", activation)

    def forward(self, x: Tensor, *fast: Tensor) -> Tensor:
        """x (B, I, H, W) and fast weights, each of the weight's shape (O, I, h, w) for all or
        (B, O, I, h, w) one an example -> (B, O, H', W').

        Raises:
            ValueError: fast weights of another shape.
        """
        return _combine(self.parts(x, *fast), self.activation)

    def parts(self, x: Tensor, *fast: Tensor) -> list[Tensor]:
        """What the activation is applied to: by the slow weights, and by each fast one."""
        parts = [self._convolve(x, self.weight, 1, self.bias)]
        for weight in fast:
            if _is_shared("FastConv2d", weight, self.weight, x):
                parts.append(self._convolve(x, weight))
            else:
                batch = x.shape[0]
                grouped = self._convolve(
                    x.reshape(1, -1, *x.shape[2:]), weight.flatten(0, 1), groups=batch
                )
                parts.append(grouped.view(batch, -1, *grouped.shape[2:]))
        return parts

    def _convolve(
        self, x: Tensor, weight: Tensor, groups: int = 1, bias: Tensor | None = None
    ) -> Tensor:
        # Not F.conv2d's keyword form of padding: "same" and "valid" are strings there.
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation!r}"


class FastSequential(nn.Sequential):
    """``nn.Sequential`` that hands fast weights to those of its layers they are for.

    A convolution, its ReLU and the 2 x 2 max-pooling after it end in one operator
    (:func:`mann_ext.ops.relu_pool`).

    Example:
        >>> net = FastSequential(FastLinear(6, 4), FastLinear(4, 2, activation=None))
        >>> net(torch.randn(3, 6), {"0.weight": torch.randn(3, 4, 6)}).shape
        torch.Size([3, 2])
    """

    def forward(self, x: Tensor, *fast: Mapping[str, Tensor]) -> Tensor:
        """x and mappings from names of parameters ("0.weight") to fast weights.

        Raises:
            ValueError: a name that no layer has.
        """
        known = {name for name, _ in self.fast_parameters()}
        for name in (name for mapping in fast for name in mapping):
            if name not in known:
                raise ValueError(
                    f"FastSequential: no fast layer has the weight {name!r}; there are "
                    f"{', '.join(sorted(known)) or 'none'}"
                )
        layers = [*self.named_children()]
        pooled = False  # by the layer before
        for i, (name, layer) in enumerate(layers):
            following = layers[i + 1][1] if i + 1 < len(layers) else None
            if pooled:
                pooled = False
            elif isinstance(layer, (FastLinear, FastConv2d)):
                weights = [m[key] for m in fast if (key := f"{name}.weight") in m]
                pooled = _pools(layer, following, weights)
                if pooled:
                    x = relu_pool(*cast(FastConv2d, layer).parts(x, *weights))
                else:
                    x = layer(x, *weights)
            else:
                x = layer(x)
        return x

    def fast_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and slow weights of the layers that can be augmented."""
        for name, layer in self.named_children():
            if isinstance(layer, (FastLinear, FastConv2d)):
                yield f"{name}.weight", cast(nn.Parameter, layer.weight)


def example_gradients(
    loss: Callable[[dict[str, Tensor], Tensor, Tensor], Tensor],
    parameters: dict[str, Tensor],
    inputs: Tensor,
    targets: Tensor,
    create_graph: bool = False,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of each example's loss, all in one call (``vmap`` of ``grad``).

    Args:
        loss: of ``parameters``, one input (...) and one target (...), a scalar.
        parameters: what to differentiate with respect to.
        inputs, targets: (S, ...), one an example.
        create_graph: True: gradients flow on into ``parameters`` (second order).

    Returns:
        gradients, each (S, *shape of the parameter), and losses (S,).
    """
    with torch.set_grad_enabled(create_graph and torch.is_grad_enabled()):
        per_example = torch.func.vmap(torch.func.grad_and_value(loss), (None, 0, 0))
        gradients, losses = per_example(parameters, inputs, targets)
    return gradients, losses


def preprocess_gradients(gradients: Tensor) -> Tensor:
    """g (...) -> (..., 2), by size and by sign (Andrychowicz et al., 2016, with p = 7)::

    (log|g| / 7, sign g)   if |g| >= e^-7
    (-1, e^7 g)            else
    """
    return gradient_features(gradients)


class CoordinateMLP(nn.Module):
    """m, which makes an example-level fast weight of each coordinate of a gradient.

    2 -> H -> H -> 1 with ReLU, of the two numbers of :func:`preprocess_gradients`. These lie on
    three lines (g < -e^-7, g > e^-7, and between), and on a line such a network is a function of
    one variable, linear but for some tens of kinks. So it is evaluated at two points of each linear
    piece, and a coordinate costs finding its piece and one multiplication: values and gradients are
    the network's to rounding, and nothing of H numbers a coordinate is ever made.

    Args:
        hidden_size: H.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.layers = nn.Sequential(
            nn.Linear(2, hidden_size, **factory), nn.ReLU(),
            nn.Linear(hidden_size, hidden_size, **factory), nn.ReLU(),
            nn.Linear(hidden_size, 1, **factory),
        )  # fmt: skip
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear``, but for the output: small, and no bias."""
        for layer in self.layers.children():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        _start_small(self.layers[-1])

    def forward(self, gradients: Tensor) -> Tensor:
        """Gradients (...) -> fast weights (...)."""
        flat = gradients.reshape(-1)
        # One variable for the three lines: t in [-1, 1] between them, (2 + log|g| / 7) sign g else.
        t = (flat * math.exp(7)).clamp(-1, 1) * (2 + flat.abs().clamp(min=math.exp(-7)).log() / 7)
        bound = t.detach().abs().amax().item() + 1 if flat.numel() else 1.0
        if not math.isfinite(bound):
            return self.direct(gradients)
        knots = self._knots(bound)
        first, last = knots[:-1], knots[1:]
        points = torch.stack([0.75 * first + 0.25 * last, 0.25 * first + 0.75 * last])
        start, end = self._run(_curve(points), len(self.layers)).squeeze(-1)
        slope = (end - start) / (points[1] - points[0])
        intercept = start - slope * points[0]
        piece = _pieces(t.detach(), knots.to(t.dtype), bound)
        lines = (intercept.to(t.dtype), slope.to(t.dtype))
        intercepts, slopes = (line.index_select(0, piece) for line in lines)
        return torch.addcmul(intercepts, slopes, t).view_as(gradients)

    def direct(self, gradients: Tensor) -> Tensor:
        """The same, the network run on every coordinate."""
        made: Tensor = self.layers(preprocess_gradients(gradients))
        return made.squeeze(-1)

    def _run(self, x: Tensor, layers: int) -> Tensor:
        """The first layers, in float64: slopes are differences of nearby values."""
        for layer in list(self.layers)[:layers]:
            if isinstance(layer, nn.Linear):
                x = F.linear(x, layer.weight.double(), layer.bias.double())
            else:
                x = layer(x)
        return x

    @torch.no_grad()
    def _knots(self, bound: float) -> Tensor:
        """Where the network may bend, from -bound to bound, in order."""
        device = next(self.parameters()).device
        knots = torch.tensor([-bound, -1, 1, bound], dtype=torch.float64, device=device)
        for layers in (1, 3):  # between its knots a unit's input is linear and crosses 0 once
            x = self._run(_curve(knots), layers)
            first, last = x[:-1], x[1:]
            shares = first / (first - last)
            crossings = knots[:-1, None] + shares * knots.diff()[:, None]
            knots = torch.cat([knots, crossings[first * last < 0]]).sort().values
        # Pieces too short to have a slope are left to their neighbours.
        return knots[torch.cat([knots.new_tensor([1.0]), knots.diff()]) > 1e-9]


def _curve(t: Tensor) -> Tensor:
    """What `preprocess_gradients` makes of the gradient that t stands for."""
    return torch.stack([(t.abs() - 2).clamp(min=-1), t.clamp(-1, 1)], -1)


def _pieces(t: Tensor, knots: Tensor, bound: float) -> Tensor:
    """The number of the piece that each t is in: a table of equal cells, then a few comparisons.

    Ten times faster than a binary search (``torch.bucketize``).
    """
    inner = knots[1:-1]
    edges = torch.linspace(-bound, bound, CELLS + 1, dtype=t.dtype, device=t.device)
    before = torch.bucketize(edges, inner, out_int32=True)
    piece = before.index_select(0, ((t + bound) * (CELLS / (2 * bound))).int())
    upper = knots[1:]
    for _ in range(int(before.diff().amax())):
        piece += t > upper.index_select(0, piece)
    return piece


class CoordinateLSTM(nn.Module):
    """d, which makes a task-level fast weight of each coordinate of T gradients.

    An LSTM, 2 -> H, over the gradients and a linear layer, H -> 1, on its last state.

    Args:
        hidden_size: H.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int = 20,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.lstm = nn.LSTM(2, hidden_size, **factory)
        self.output = nn.Linear(hidden_size, 1, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.LSTM`` and ``nn.Linear``, but for the output: small, and no bias."""
        self.lstm.reset_parameters()
        self.output.reset_parameters()
        _start_small(self.output)

    def forward(self, gradients: Tensor) -> Tensor:
        """Gradients (T, P) -> fast weights (P,)."""
        return coordinate_lstm(gradients, *self.lstm.parameters(), *self.output.parameters())


@torch.no_grad()
def _start_small(output: nn.Module) -> None:
    """An output layer of fast weights much smaller than slow ones.

    The part that all coordinates have in common counts: with 0.1 in every weight of a filter bank,
    each of the five convolutions would multiply its input by tens.
    """
    assert isinstance(output, nn.Linear)
    output.weight.mul_(0.01)
    output.bias.zero_()


class MetaLearner(nn.Module):
    """One coordinate-wise learner for convolutions and one for linear layers.

    Args:
        make: makes a learner.
    """

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.convolution, self.linear = make(), make()

    def reset_parameters(self) -> None:
        """New random weights."""
        for learner in (self.convolution, self.linear):
            cast(Any, learner).reset_parameters()

    def of(self, weight: Tensor) -> nn.Module:
        """The learner for fast weights of this shape."""
        return self.linear if weight.dim() == 2 else self.convolution

    def forward(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by name, each (S, *shape) -> fast weights by name, (S, *shape) or (*shape)."""
        made: dict[str, Tensor] = {}
        for learner in (self.convolution, self.linear):
            # All of a learner's coordinates at once: the smallest layers have a few hundred.
            chosen = {n: g.flatten(1) for n, g in gradients.items() if self.of(g[0]) is learner}
            if chosen:
                sizes = [g.shape[1] for g in chosen.values()]
                parts = learner(torch.cat(list(chosen.values()), 1)).split(sizes, -1)
                made |= zip(chosen, parts, strict=True)
        return {name: made[name].unflatten(-1, g.shape[1:]) for name, g in gradients.items()}


def _pools(layer: nn.Module, following: nn.Module | None, weights: list[Tensor]) -> bool:
    """Whether the layer's ReLU and the one after it are what relu_pool computes."""
    return (
        isinstance(layer, FastConv2d)
        and layer.activation == "relu"
        and len(weights) <= 2
        and type(following) is nn.MaxPool2d
        and following.kernel_size in (2, (2, 2))
        and following.stride in (2, (2, 2))
        and following.padding in (0, (0, 0))
        and following.dilation in (1, (1, 1))
        and following.ceil_mode
        and not following.return_indices
    )


def _checked_activation(module: str, activation: Activation) -> Activation:
    if activation not in ("relu", None):
        raise ValueError(f"{module}: expected activation 'relu' or None, got {activation!r}")
    return activation


def _is_shared(module: str, fast: Tensor, slow: Tensor, x: Tensor) -> bool:
    """Whether the fast weights are the same for all examples; they fit, or it is an error."""
    if fast.shape == slow.shape:
        return True
    if fast.shape[1:] == slow.shape and fast.shape[0] == x.shape[0]:
        return False
    shape = tuple(slow.shape)
    raise ValueError(
        f"{module}: expected fast weights of shape {shape}, or {(x.shape[0], *shape)} for one an "
        f"example, got {tuple(fast.shape)}"
    )


def _combine(parts: list[Tensor], activation: Activation) -> Tensor:
    if activation is not None:
        parts = [part.relu_() for part in parts]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
