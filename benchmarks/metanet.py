"""A training step of MetaNet against one that loops over the examples, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mann_ext.fast_weights import FastConv2d, FastLinear, FastSequential, preprocess_gradients
from mann_ext.models import MetaNet

QUERIES = 10
"""A class, as in the paper."""


def net(
    model: FastSequential, image: Tensor, *fast: list[Tensor], features: bool = False
) -> Tensor:
    """A CNN on one image, with fast weights for each of its layers, in order."""
    layers = [layer for layer in model if isinstance(layer, (FastConv2d, FastLinear))]
    x = image.unsqueeze(0)
    for i, layer in enumerate(layers[:-1] if features else layers):
        if isinstance(layer, FastConv2d):
            out = [F.conv2d(x, w, padding=1).relu() for w in (layer.weight, *(f[i] for f in fast))]
            x = F.max_pool2d(sum(out, torch.zeros(())), 2, ceil_mode=True)
        else:
            linear = [F.linear(x.flatten(1), w) for w in (layer.weight, *(f[i] for f in fast))]
            last = i == len(layers) - 1
            x = sum(linear if last else [y.relu() for y in linear], torch.zeros(()))
    return x.squeeze(0)


def support_gradients(
    model: FastSequential, support: Tensor, labels: Tensor
) -> tuple[list[list[Tensor]], list[float]]:
    """By the slow weights, for each example; and the losses."""
    gradients, losses = [], []
    for image, label in zip(support, labels, strict=True):
        loss = F.cross_entropy(net(model, image), label)
        gradients.append(list(torch.autograd.grad(loss, list(model.parameters()))))
        losses.append(loss.item())
    return gradients, losses


def task_weights(
    model: MetaNet, gradients: list[list[Tensor]], losses: list[float]
) -> list[Tensor]:
    """One run of the LSTM for each layer."""
    assert model.task_learner is not None
    order = sorted(range(len(losses)), key=lambda i: -losses[i])[: model.task_examples]
    made = []
    for layer in zip(*(gradients[i] for i in order), strict=True):
        learner: Any = model.task_learner.of(layer[0])
        x = torch.stack([preprocess_gradients(g).flatten(0, -2) for g in layer])
        lstm = learner.lstm
        hidden = torch._VF.lstm(
            x, (x.new_zeros(1, x.shape[1], lstm.hidden_size),) * 2, list(lstm.parameters()),
            True, 1, 0.0, True, False, False,
        )[1]  # fmt: skip
        made.append(learner.output(hidden[0]).view_as(layer[0]))
    return made


def looped_logits(model: MetaNet, support: Tensor, labels: Tensor, queries: Tensor) -> Tensor:
    """The model as one would first write it: every example by itself, and everything in autograd."""
    gradients, losses = support_gradients(model.base, support, labels)
    memory = []
    for example in gradients:
        weights = []
        for g in example:
            learner: Any = model.example_learner.of(g)
            weights.append(learner.layers(preprocess_gradients(g)).squeeze(-1))
        memory.append(weights)
    embedding_fast, base_fast = [], []
    if model.task_learner is not None:
        if model.variant == "plus":
            base_fast.append(task_weights(model, gradients, losses))
        embedding_gradients, losses = support_gradients(model.embedding, support, labels)
        kept = [g[:-1] for g in embedding_gradients]
        embedding_fast.append(task_weights(model, kept, losses))
    keys = torch.stack([net(model.embedding, x, *embedding_fast, features=True) for x in support])
    logits = []
    for query in queries:
        represented = net(model.embedding, query, *embedding_fast, features=True)
        norms = keys.norm(dim=-1) * represented.norm()
        read = (keys @ represented / (norms + 1e-8)).softmax(0)
        fast = [
            sum((a * w for a, w in zip(read, stored, strict=True)), torch.zeros(()))
            for stored in zip(*memory, strict=True)
        ]
        logits.append(net(model.base, query, fast, *base_fast))
    return torch.stack(logits)


def task(ways: int, shots: int = 1, queries: int = QUERIES) -> tuple[Tensor, ...]:
    """Random images: support, labels, queries and their labels."""
    torch.manual_seed(0)
    labels = torch.arange(ways).repeat_interleave(shots)
    query_labels = torch.arange(ways).repeat_interleave(queries)
    return (
        torch.rand(ways * shots, 1, 28, 28), labels,
        torch.rand(ways * queries, 1, 28, 28), query_labels,
    )  # fmt: skip


def training_step(ways: int, variant: Any = "metanet", looped: bool = False) -> Callable[[], float]:
    """Forward and backward of one task; gives the loss."""
    torch.manual_seed(1)
    model = MetaNet(ways, variant)
    support, labels, queries, query_labels = task(ways)

    def step() -> float:
        model.zero_grad()
        run: Callable[..., Tensor] = looped_logits if looped else MetaNet.forward
        loss = F.cross_entropy(run(model, support, labels, queries), query_labels)
        loss.backward()
        return loss.item()

    return step
