"""A training step of MetaNet against one that loops over the examples, and its memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import measure
from mann_ext import ops
from mann_ext.fast_weights import FastConv2d, FastLinear, FastSequential, preprocess_gradients
from mann_ext.models import MetaNet

QUERIES = 10
"""A class, as in the paper."""


def net(
    model: FastSequential, image: Tensor, *fast: list[Tensor], features: bool = False
) -> Tensor:
    """A CNN on one image, with fast weights for each of its layers, in order; ``features``: up to
    its hidden layer. No ReLU at the end."""
    layers = [layer for layer in model if isinstance(layer, (FastConv2d, FastLinear))]
    layers = layers[:-1] if features else layers
    x = image.unsqueeze(0)
    for i, layer in enumerate(layers):
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
    """The model as one would first write it: every example by itself, autograd for everything."""
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
        read = (model.read_strength * (keys @ represented) / (norms + 1e-8)).softmax(0)
        fast = [
            sum((a * w for a, w in zip(read, stored, strict=True)), torch.zeros(()))
            for stored in zip(*memory, strict=True)
        ]
        logits.append(net(model.base, query, fast, *base_fast))
    return torch.stack(logits)


def task(ways: int, shots: int = 1) -> tuple[Tensor, ...]:
    """Random images: support, labels, queries and their labels."""
    torch.manual_seed(0)
    labels = torch.arange(ways).repeat_interleave(shots)
    query_labels = torch.arange(ways).repeat_interleave(QUERIES)
    return (
        torch.rand(len(labels), 1, 28, 28), labels,
        torch.rand(len(query_labels), 1, 28, 28), query_labels,
    )  # fmt: skip


def training_step(
    ways: int, variant: Any = "metanet", looped: bool = False, shots: int = 1
) -> Callable[[], float]:
    """Forward and backward of one task; gives the loss."""
    torch.manual_seed(1)
    model = MetaNet(ways, variant)
    support, labels, queries, query_labels = task(ways, shots)

    def step() -> float:
        model.zero_grad()
        run: Callable[..., Tensor] = looped_logits if looped else MetaNet.forward
        loss = F.cross_entropy(run(model, support, labels, queries), query_labels)
        loss.backward()
        return loss.item()

    return step


def backward(run: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Forward and backward of a part of the step."""
    with torch.no_grad():
        grad = torch.randn_like(run())
    return lambda: torch.autograd.grad(run(), inputs, grad)


def read_contenders(ways: int, width: int) -> dict[str, Callable[[], object]]:
    """The fast weights of all queries: scores and a matrix product, or one fused read."""
    keys, queries, values = (
        torch.randn(*shape, requires_grad=True)
        for shape in ((ways, 64), (ways * QUERIES, 64), (ways, width))
    )
    inputs = (keys, queries, values)
    return {
        "product": backward(lambda: ops.content_read(queries, keys).weights @ values, inputs),
        "fused": backward(lambda: ops.content_read(queries, keys, values).reads, inputs),
    }


def convolution_contenders(channels: int, side: int) -> dict[str, Callable[[], object]]:
    """A convolution of 50 queries by fast weights mixed from 5: mixed first or last."""
    x = torch.randn(50, channels, side, side, requires_grad=True)
    stored = torch.randn(5, 64, channels, 3, 3, requires_grad=True)
    weights = torch.rand(50, 5).softmax(-1).requires_grad_()

    def mixed() -> Tensor:
        return (weights @ stored.flatten(1)).view(-1, *stored.shape[1:])

    def grouped() -> Tensor:
        out = F.conv2d(x.reshape(1, -1, side, side), mixed().flatten(0, 1), padding=1, groups=50)
        return out.view(50, 64, side, side)

    def unfolded() -> Tensor:
        patches = F.unfold(x, 3, padding=1)
        return torch.bmm(mixed().view(50, 64, -1), patches).view(50, 64, side, side)

    def mixed_last() -> Tensor:
        out = F.conv2d(x, stored.flatten(0, 1), padding=1).unflatten(1, (5, 64))
        return torch.einsum("qs,qschw->qchw", weights, out)

    inputs = (x, stored, weights)
    forms = {"grouped": grouped, "unfolded": unfolded, "mixed last": mixed_last}
    return {name: backward(form, inputs) for name, form in forms.items()}


def peak_mebibytes(shots: int, looped: bool) -> float:
    """What a 5-way training step adds in a fresh process."""
    code = (
        "from benchmarks import metanet\n"
        "torch.set_num_threads(1)\n"
        f"metanet.training_step(5, shots={shots}, looped={looped})()"
    )
    return measure.peak_memory(code) / 2**20


def run(repeats: int = 15, threads: int = 2) -> dict[str, Any]:
    """Training steps against the loop, parts of the step in other forms, and peak memory."""
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    try:
        for count in sorted({1, threads}):
            torch.set_num_threads(count)
            for ways, variant in ((5, "metanet"), (5, "minus"), (5, "plus"), (20, "metanet")):
                steps = {
                    "native": training_step(ways, variant),
                    "loop": training_step(ways, variant, looped=True),
                }
                losses = {name: step() for name, step in steps.items()}
                timed = measure.side_by_side(steps, min(repeats, 5), 1)
                what = f"{ways}-way 1-shot training step, {variant}"
                rows.append({"what": what, "threads": count, "losses": losses, **timed})
            cases = {
                f"read, {ways}-way, values of {width:,}": read_contenders(ways, width)
                for ways in (5, 20) for width in (4096, 147456)
            }  # fmt: skip
            for channels, side in ((1, 28), (64, 14), (64, 7), (64, 4), (64, 2)):
                what = f"convolution, {channels} channels, {side} x {side}"
                cases[what] = convolution_contenders(channels, side)
            for what, contenders in cases.items():
                timed = measure.side_by_side(contenders, repeats, 1)
                parts.append({"what": what, "threads": count, **timed})
    finally:
        torch.set_num_threads(before)
    memory = [
        {"shots": shots, **{n: peak_mebibytes(shots, n == "loop") for n in ("native", "loop")}}
        for shots in (1, 2, 4)
    ]
    return {"machine": measure.machine(), "rows": rows, "parts": parts, "memory": memory}


def show(report: dict[str, Any]) -> None:
    """Print the rows as tables."""
    table = []
    for row in report["rows"]:
        native, loop = row["native"]["median_ms"], row["loop"]["median_ms"]
        gap = abs(row["losses"]["native"] - row["losses"]["loop"])
        table.append([row["what"], row["threads"], native, loop, f"{loop / native:.2f}x", gap])
    columns = ["what", "threads", "ms", "loop ms", "loop / ours", "difference of the losses"]
    measure.print_table("MetaNet", columns, table)
    table = []
    for row in report["parts"]:
        times = {n: t["median_ms"] for n, t in row.items() if isinstance(t, dict)}
        table.append(
            [row["what"], row["threads"], ", ".join(f"{n} {t:.3g}" for n, t in times.items())]
        )
    measure.print_table("Parts, forward + backward", ["what", "threads", "ms"], table)
    table = [[row["shots"], row["native"], row["loop"]] for row in report["memory"]]
    measure.print_table("Peak memory, 5-way", ["shots", "MiB", "loop MiB"], table)
