"""Layers augmented by fast weights, and the meta learners that make them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from mann_ext.fast_weights import (
    CoordinateLSTM,
    CoordinateMLP,
    FastConv2d,
    FastLinear,
    FastSequential,
    MetaLearner,
    example_gradients,
    preprocess_gradients,
)

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
activations = pytest.mark.parametrize("activation", ["relu", None])


def make_layers(activation):
    """A layer, its input, and fast weights for all and for each example."""
    conv = FastConv2d(2, 2, (3, 2), stride=2, padding=1, activation=activation, **DOUBLE)
    linear = FastLinear(3, 2, activation=activation, **DOUBLE)
    for layer, x in ((conv, torch.randn(2, 2, 3, 2)), (linear, torch.randn(2, 3))):
        shared, own = torch.randn(layer.weight.shape), torch.randn(2, *layer.weight.shape)
        yield layer, x.double(), shared.double(), own.double()


@activations
def test_an_augmented_layer_is_the_sum_of_its_branches(activation):
    for layer, x, shared, own in make_layers(activation):
        f = torch.relu if activation else lambda y: y
        for i in range(2):
            one = x[i : i + 1]
            if isinstance(layer, FastConv2d):
                fast = [F.conv2d(one, w, stride=2, padding=1) for w in (shared, own[i])]
                slow = F.conv2d(one, layer.weight, layer.bias, stride=2, padding=1)
            else:
                fast = [one @ w.T for w in (shared, own[i])]
                slow = one @ layer.weight.T + layer.bias
            expected = f(slow) + f(fast[0]) + f(fast[1])
            torch.testing.assert_close(layer(x, shared, own)[i : i + 1], expected)
            torch.testing.assert_close(layer(x)[i : i + 1], f(slow))


@activations
def test_gradients_of_augmented_layers(activation):
    for layer, *inputs in make_layers(activation):

        def run(weight, bias, *inputs, layer=layer):
            return functional_call(layer, {"weight": weight, "bias": bias}, inputs)

        everything = [layer.weight, layer.bias, *(x.requires_grad_() for x in inputs)]
        assert torch.autograd.gradcheck(run, everything)
        assert torch.autograd.gradgradcheck(run, everything)


def test_a_sequence_hands_each_layer_its_own_fast_weights():
    net = FastSequential(
        FastConv2d(1, 2, 3), torch.nn.Flatten(), FastLinear(8, 3), FastLinear(3, 2, activation=None)
    )
    x, conv, last = torch.randn(5, 1, 4, 4), torch.randn(5, 2, 1, 3, 3), torch.randn(2, 3)
    hidden = net[2](net[0](x, conv).flatten(1))
    expected = net[3](hidden, last, 2 * last)
    made = net(x, {"0.weight": conv, "3.weight": last}, {"3.weight": 2 * last})
    torch.testing.assert_close(made, expected)
    assert [name for name, _ in net.fast_parameters()] == ["0.weight", "2.weight", "3.weight"]


def test_bad_fast_weights_are_named():
    net = FastSequential(FastLinear(3, 2))
    with pytest.raises(ValueError, match=r"no fast layer has the weight '1.weight'; there are 0"):
        net(torch.randn(4, 3), {"1.weight": torch.randn(2, 3)})
    with pytest.raises(ValueError, match=r"\(2, 3\), or \(4, 2, 3\) for one an example, got"):
        net[0](torch.randn(4, 3), torch.randn(3, 2, 3))
    with pytest.raises(ValueError, match="FastConv2d: expected fast weights of shape"):
        FastConv2d(1, 2, 3)(torch.randn(4, 1, 5, 5), torch.randn(2, 1, 3, 2))
    with pytest.raises(ValueError, match="activation 'relu' or None, got 'tanh'"):
        FastLinear(3, 2, activation="tanh")


def test_example_gradients_are_those_of_a_loop():
    net = FastSequential(FastLinear(4, 6), FastLinear(6, 3, activation=None)).double()
    x, y = torch.randn(5, 4, **DOUBLE), torch.tensor([0, 2, 1, 1, 0])

    def loss(parameters, x, y):
        return F.cross_entropy(functional_call(net, parameters, (x[None],)), y[None])

    parameters = dict(net.named_parameters())
    found, losses = example_gradients(loss, parameters, x, y)
    for i in range(5):
        own = F.cross_entropy(net(x[i : i + 1]), y[i : i + 1])
        expected = torch.autograd.grad(own, [*net.parameters()])
        for got, want in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(got[i], want)
        torch.testing.assert_close(losses[i], own)
    assert not any(g.requires_grad for g in found.values())
    found, _ = example_gradients(loss, parameters, x, y, create_graph=True)
    assert all(g.requires_grad for g in found.values())


def test_gradients_enter_by_size_and_sign():
    e = torch.e
    found = preprocess_gradients(torch.tensor([e**-3.5, -e, -(e**-8), 0.0]))
    expected = torch.tensor([[-0.5, 1], [1 / 7, -1], [-1, -1 / e], [-1, 0]])
    torch.testing.assert_close(found, expected)


def spread_gradients(count: int, dtype: torch.dtype) -> torch.Tensor:
    """From 1e-9 to 1e9, both signs, with zeros among them."""
    x = torch.randn(count, **DOUBLE) * (10 ** (18 * torch.rand(count, **DOUBLE) - 9))
    x[::17] = 0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("seed", range(4))
def test_m_by_pieces_is_the_network(dtype, seed):
    torch.manual_seed(seed)
    learner = CoordinateMLP(dtype=dtype)
    gradients = spread_gradients(5000, dtype).view(2, -1).requires_grad_()
    grad_out = torch.randn_like(gradients)
    made, expected = learner(gradients), learner.direct(gradients)
    torch.testing.assert_close(made, expected)
    inputs = [gradients, *learner.parameters()]
    exact = learner.double().direct(gradients.double())
    reference = torch.autograd.grad(exact, inputs, grad_out.double())
    # Sums over 5,000 coordinates: as far off as float32 makes them, and no further.
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    learner.to(dtype)
    inputs = [gradients, *learner.parameters()]
    for got, want in zip(
        torch.autograd.grad(learner(gradients), inputs, grad_out), reference, strict=True
    ):
        assert (got - want).norm() <= tolerance * want.norm()


def test_m_bends_where_the_network_bends():
    learner = CoordinateMLP(3, dtype=torch.float64)

    def run(gradients, *weights):
        return functional_call(learner, dict(zip(names, weights, strict=True)), (gradients,))

    names = [name for name, _ in learner.named_parameters()]
    gradients = torch.linspace(-1.3, 1.3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (gradients, *learner.parameters()))
    assert torch.autograd.gradgradcheck(run, (gradients, *learner.parameters()))


def test_m_of_nothing_and_of_gradients_that_are_not_finite():
    learner = CoordinateMLP()
    assert learner(torch.empty(3, 0)).shape == (3, 0)
    made = learner(torch.tensor([0.5, float("nan"), float("inf")]))
    torch.testing.assert_close(made[0], learner.direct(torch.tensor([0.5]))[0])
    assert made[1].isnan()
    with torch.no_grad():
        for parameter in learner.parameters():
            parameter.zero_()
    assert not learner(torch.randn(7)).any()


@pytest.mark.parametrize("make", [CoordinateMLP, CoordinateLSTM])
def test_meta_learners_treat_coordinates_alike(make):
    learner = MetaLearner(lambda: make(4))
    gradients = {"a": torch.randn(3, 2, 2, 3, 3), "b": torch.randn(3, 4, 5), "c": torch.randn(3, 1)}
    gradients["c"] = gradients["b"][:, :2, :3]
    made = learner(gradients)
    expected = (3,) if make is CoordinateMLP else ()
    assert made["a"].shape == (*expected, 2, 2, 3, 3)
    assert made["b"].shape == (*expected, 4, 5)
    torch.testing.assert_close(made["c"], made["b"][..., :2, :3])
    flipped = learner({"a": gradients["a"].flip(2)})
    torch.testing.assert_close(flipped["a"], made["a"].flip(-3))
    assert (made["a"].flatten()[0] - learner.linear(gradients["a"].flatten(1)).flatten()[0]) != 0
