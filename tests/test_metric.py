"""Siamese, matching and prototypical networks: what they compute, and that they learn."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mann_ext.data import TaskSampler
from mann_ext.models import MatchingNet, PrototypicalNet, SiameseNet
from mann_ext.models.metric import pair_loss

NETS = [SiameseNet, MatchingNet, PrototypicalNet]


def task(ways: int = 3, shots: int = 2, queries: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    labels = torch.randperm(ways * shots) % ways
    return torch.rand(ways * shots, 1, 16, 16), labels, torch.rand(queries, 1, 16, 16)


def net_of(kind: type[nn.Module]) -> nn.Module:
    return kind(filters=4, image_size=16).double().eval()


@pytest.mark.parametrize("kind", NETS)
def test_the_order_of_the_support_images_does_not_matter_and_labels_name_the_outputs(kind):
    net = net_of(kind)
    support, labels, queries = (x.double() if x.is_floating_point() else x for x in task())
    logits = net(support, labels, queries)
    assert logits.shape == (4, 3)
    order = torch.randperm(6)
    torch.testing.assert_close(net(support[order], labels[order], queries), logits)
    renamed = torch.tensor([2, 0, 1])
    moved = net(support, renamed[labels], queries)
    torch.testing.assert_close(moved[:, renamed], logits)
    torch.testing.assert_close(net(support, labels, queries, ways=3), logits)


@pytest.mark.parametrize("kind", NETS)
def test_a_query_by_query_loop_gives_the_published_equations(kind):
    net = net_of(kind)
    support, labels, queries = (x.double() if x.is_floating_point() else x for x in task())
    shown, asked = net.embedding(support), net.embedding(queries)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for q in range(4):
        for k in range(3):
            members = [i for i in range(6) if labels[i] == k]
            if kind is PrototypicalNet:
                prototype = sum(shown[i] for i in members) / len(members)
                expected[q, k] = -((asked[q] - prototype) ** 2).sum()
            elif kind is MatchingNet:
                cosines = torch.stack([F.cosine_similarity(asked[q], x, dim=0) for x in shown])
                attention = cosines.exp() / cosines.exp().sum()
                expected[q, k] = sum(attention[i] for i in members).log()
            else:
                pairs = [
                    (net.same.weight[0] * (asked[q].sigmoid() - shown[i].sigmoid()).abs()).sum()
                    + net.same.bias[0]
                    for i in members
                ]
                expected[q, k] = sum(pairs) / len(pairs)
    torch.testing.assert_close(net(support, labels, queries), expected)


def test_the_loss_of_pairs_weighs_same_and_other_alike():
    logits, labels = torch.randn(6, 5), torch.randint(5, (6,))
    same, other = [], []
    for q in range(6):
        for k in range(5):
            p = logits[q, k].sigmoid()
            same += [-p.log()] if labels[q] == k else []
            other += [] if labels[q] == k else [-(1 - p).log()]
    expected = (sum(same) / len(same) + sum(other) / len(other)) / 2
    torch.testing.assert_close(pair_loss(logits, labels), expected)


@pytest.mark.parametrize("kind", NETS)
def test_it_learns_to_tell_stripes_apart(kind):
    torch.manual_seed(0)
    place = torch.arange(16.0)
    # Ten directions and widths of stripes, with noise.
    waves = [
        torch.sin(place[:, None] * a + place * b).mul(0.5).add(0.5)
        for a, b in [(i, j) for i in (0.3, 0.9, 1.5) for j in (0.0, 0.7, 1.4)] + [(0.0, 1.0)]
    ]
    images = torch.stack([wave + 0.3 * torch.randn(16, 16) for wave in waves for _ in range(12)])
    sampler = TaskSampler(images, torch.arange(10).repeat_interleave(12), ways=5, queries=5)
    net = kind(filters=8, image_size=16)
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    right = []
    for _ in range(60):
        support, labels, queries, answers = (part[0] for part in sampler.sample())
        logits = net(support, labels, queries)
        loss = (pair_loss if kind is SiameseNet else F.cross_entropy)(logits, answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        right.append((logits.argmax(-1) == answers).float().mean())
    assert sum(right[-10:]) / 10 > 0.7, "chance is 0.2"


@pytest.mark.parametrize("kind", NETS)
def test_inputs_that_do_not_fit_are_named(kind):
    net = kind(filters=4, image_size=16, channels=3)
    support, labels = torch.rand(2, 3, 16, 16), torch.arange(2)
    with pytest.raises(ValueError, match=r"queries of shape \(images, 3, 16, 16\), got \(1, 3, 8"):
        net(support, labels, torch.rand(1, 3, 8, 8))
    with pytest.raises(ValueError, match=r"support of shape \(images, 3, 16, 16\), got \(3, 16"):
        net(support[0], labels, support)
    with pytest.raises(ValueError, match=r"support_labels of shape \(2,\), one a support"):
        net(support, labels[:1], support)
    with pytest.raises(TypeError, match=r"support_labels of dtype int64, got torch\.float32"):
        net(support, labels.float(), support)
    with pytest.raises(ValueError, match=r"image_size of at least 16, .* got 8"):
        kind(image_size=8)
    with pytest.raises(ValueError, match="filters to be a whole number of at least 1, got 0"):
        kind(filters=0)


@pytest.mark.parametrize("kind", NETS)
def test_the_embedding_is_four_blocks_of_64_filters(kind):
    net = kind(channels=3, image_size=84)
    assert net.embedding(torch.rand(2, 3, 84, 84)).shape == (2, 64 * 5 * 5)
    filters = [m.out_channels for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert filters == [64] * 4
