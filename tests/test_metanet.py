"""MetaNet: against a loop over the examples, its gradients, what permutes what, and its errors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from benchmarks.metanet import looped_logits
from mann_ext import checkpoint
from mann_ext.models import MetaNet

variants = pytest.mark.parametrize("variant", ["minus", "metanet", "plus"])
TOY = {"filters": 3, "image_size": 5, "width": 4, "blocks": 2, "meta_size": 3, "ways": 3}


def make(variant="metanet", **options) -> MetaNet:
    model = MetaNet(variant=variant, dtype=torch.float64, **{**TOY, **options})
    with torch.no_grad():  # fast weights of the size of the slow ones
        for parameter in model.meta_parameters():
            parameter.copy_(torch.randn_like(parameter))
        for parameter in model.slow_parameters():  # few dead units
            parameter.add_(0.2)
    return model


def task(ways=3, shots=2, queries=4):
    labels = torch.arange(ways).repeat(shots)
    images = torch.rand(ways * shots + queries, 1, 5, 5, dtype=torch.float64)
    return images[: ways * shots], labels, images[ways * shots :]


@variants
@pytest.mark.parametrize("options", [{}, {"task_examples": 2}, {"read_strength": 7.5}])
def test_the_model_is_its_loop_over_examples(variant, options):
    model, inputs = make(variant, **options), task()
    made, looped = model(*inputs), looped_logits(model, *inputs)
    torch.testing.assert_close(made, looped)
    weights = torch.randn_like(made)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(made, [*parameters.values()], weights, allow_unused=True)
    expected = torch.autograd.grad(looped, [*parameters.values()], weights, allow_unused=True)
    for name, got, want in zip(parameters, found, expected, strict=True):
        assert (got is None) == (want is None), name
        if got is not None:
            torch.testing.assert_close(got, want)


@variants
def test_a_query_is_classified_by_itself(variant):
    model, (support, labels, queries) = make(variant), task()
    whole = model(support, labels, queries)
    torch.testing.assert_close(model(support, labels, queries[1:2]), whole[1:2])


def check_gradients(model: MetaNet, names: list[str]) -> bool:
    inputs = task(queries=2)
    parameters = dict(model.named_parameters())

    def run(*values):
        return functional_call(model, dict(zip(names, values, strict=True)), inputs)

    return torch.autograd.gradcheck(run, [parameters[name] for name in names], fast_mode=True)


@variants
def test_gradients_of_the_whole_model_in_second_order(variant):
    model = make(variant, second_order=True)
    assert check_gradients(model, [name for name, _ in model.named_parameters()])


@variants
def test_first_order_leaves_out_the_way_through_the_gradients_alone(variant):
    model = make(variant)
    meta = [name for name, _ in model.named_parameters() if "learner" in name]
    assert check_gradients(model, meta)
    slow = [name for name, _ in model.named_parameters() if "learner" not in name]
    inputs = task()
    first = torch.autograd.grad(
        model(*inputs).square().sum(), [*model.slow_parameters()], allow_unused=True
    )
    gradients, losses = model._gradients(model.base, *inputs[:2])
    assert not any(g.requires_grad for g in (*gradients.values(), losses))
    model.second_order = True
    second = torch.autograd.grad(
        model(*inputs).square().sum(), [*model.slow_parameters()], allow_unused=True
    )
    # The embedding's output layer has a part in the gradients and nowhere else.
    unused = [name for name, grad in zip(slow, first, strict=True) if grad is None]
    assert unused == ["embedding.6.weight"]
    assert (second[-1] is None) == (variant == "minus")
    for a, b in zip(first[:4], second[:4], strict=True):  # of the base learner
        assert (a - b).norm() > 1e-6 * b.norm()


@variants
def test_the_order_of_the_support_examples_is_nothing(variant):
    model, (support, labels, queries) = make(variant, task_examples=4), task()
    order = torch.randperm(len(labels))
    torch.testing.assert_close(
        model(support[order], labels[order], queries), model(support, labels, queries)
    )


@variants
def test_permuting_labels_permutes_outputs_with_the_slow_output_rows(variant):
    model, (support, labels, queries) = make(variant), task()
    before = model(support, labels, queries)
    order = torch.tensor([2, 0, 1])  # class c is called order[c] from now on
    with torch.no_grad():
        for net in (model.base, model.embedding):
            net[-1].weight[order] = net[-1].weight.clone()
    torch.testing.assert_close(model(support, order[labels], queries)[:, order], before)


def test_loss_is_the_cross_entropy_of_the_queries():
    model, (support, labels, queries) = make(), task(queries=3)
    loss, logits = model.loss(support, labels, queries, torch.tensor([0, 1, 2]))
    torch.testing.assert_close(logits, model(support, labels, queries))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([0, 1, 2])))


def test_a_few_steps_learn_a_task():
    model = MetaNet(variant="metanet", ways=3, filters=16, image_size=5, width=16, blocks=2)
    support, labels, _ = (x.float() if x.is_floating_point() else x for x in task(shots=1))
    optimizer = torch.optim.Adam(model.parameters(), 0.003)
    losses = []
    for _ in range(40):
        loss, _ = model.loss(support, labels, support, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@variants
def test_weights_survive_a_state_dict_and_a_checkpoint(variant, tmp_path: Path):
    model, inputs = make(variant), task()
    folder = checkpoint.save(tmp_path, 1, {"model": model.state_dict()})
    other = make(variant)
    assert not torch.equal(other(*inputs), model(*inputs))
    checkpoint.load_weights(other, checkpoint.load(folder)["model"], folder)
    assert torch.equal(other(*inputs), model(*inputs))


def test_another_number_of_classes():
    model = make()
    for ways in (2, 3, 5):
        other, inputs = model.with_ways(ways), task(ways=ways)
        assert other(*inputs).shape == (4, ways)
        own, copied = model.base[-1].weight, other.base[-1].weight
        expected = own if ways == 3 else own.mean(0).expand(ways, -1)
        assert torch.equal(copied, expected)
        assert copied.requires_grad
        assert all(
            torch.equal(*w)
            for w in zip(model.meta_parameters(), other.meta_parameters(), strict=True)
        )
    assert model.ways == 3
    assert model.base[-1].weight.shape == (3, 4)


def test_another_base_learner():
    model, inputs = make(), task()
    other = model.with_base(filters=5)
    assert other(*inputs).shape == (4, 3)
    assert other.base[0].weight.shape[0] == 5
    assert other.embedding[0].weight.shape[0] == 3
    assert not any(weight.requires_grad for weight in other.base.parameters())
    other(*inputs).sum().backward()  # the rest can still be trained
    assert model.filters == 3


def test_slow_weights_are_replaced_and_meta_weights_kept():
    model = make()
    slow = [weight.clone() for weight in model.slow_parameters()]
    meta = [weight.clone() for weight in model.meta_parameters()]
    model.reset_slow_weights()
    assert not any(torch.equal(*pair) for pair in zip(slow, model.slow_parameters(), strict=True))
    assert all(torch.equal(*pair) for pair in zip(meta, model.meta_parameters(), strict=True))
    assert len(slow) + len(meta) == len(list(model.parameters()))


def test_evaluation_without_gradients_gives_the_same():
    model, inputs = make("plus", second_order=True), task()
    with torch.no_grad():
        made = model(*inputs)
    assert not made.requires_grad
    torch.testing.assert_close(made, model(*inputs))
    with torch.inference_mode():
        torch.testing.assert_close(model(*inputs), made)


def test_the_paper_s_network_ends_in_one_pixel():
    model = MetaNet(20)
    assert [tuple(w.shape) for _, w in model.base.fast_parameters()] == [
        (64, 1, 3, 3), *[(64, 64, 3, 3)] * 4, (64, 64), (20, 64),
    ]  # fmt: skip


IMAGES, LABELS = torch.rand(3, 1, 5, 5, dtype=torch.float64), torch.arange(3)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (
            (IMAGES[:, 0], LABELS, IMAGES),
            ValueError,
            r"support of shape \(images, 1, 5, 5\)",
        ),
        ((IMAGES, LABELS, IMAGES[..., :4]), ValueError, r"queries of shape .* got \(3, 1, 5, 4\)"),
        (
            (IMAGES, LABELS, IMAGES.float()),
            TypeError,
            r"float32; convert it with .to",
        ),
        ((IMAGES, LABELS[:2], IMAGES), ValueError, r"support_labels of shape \(3,\)"),
        ((IMAGES, LABELS.int(), IMAGES), TypeError, "int64, got torch.int32"),
        ((IMAGES, LABELS + 1, IMAGES), ValueError, "from 0 to 2 for 3 classes, got 1 to 3"),
        ((IMAGES, LABELS - 1, IMAGES), ValueError, "got -1 to 1"),
        ((IMAGES[:0], LABELS[:0], IMAGES), ValueError, r"support of shape .* got \(0, 1, 5, 5\)"),
        ((IMAGES, LABELS, IMAGES[:0]), ValueError, r"queries of shape .* at least one"),
        (([], LABELS, IMAGES), TypeError, "support to be a tensor, got list"),
    ],
)
def test_bad_inputs_are_named(inputs, error, message):
    with pytest.raises(error, match=message):
        make()(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "star"}, "variant one of .*, got 'star'"),
        ({"ways": 0}, "ways to be a whole number of at least 1, got 0"),
        ({"task_examples": 0}, "task_examples"),
        ({"read_strength": 0.0}, "read_strength > 0, got 0.0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)
