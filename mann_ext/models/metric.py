"""Few-shot classifiers that compare images in a learned space: the baselines of MetaNet.

All see one N-way task a call, ``model(support, support_labels, queries) -> logits (Q, ways)``, and
take any number of ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mann_ext.memory import _inputs

__all__ = ["MatchingNet", "PrototypicalNet", "SiameseNet", "pair_loss"]

BLOCKS = 4


class _MetricNet(nn.Module):
    """An embedding of 4 x (3x3 convolution, batch normalisation, ReLU, 2x2 max-pooling), and how
    queries are compared with the support images in it."""

    def __init__(
        self,
        filters: int = 64,
        image_size: int = 28,
        *,
        channels: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        _inputs.check_sizes(name, filters=filters, image_size=image_size, channels=channels)
        if image_size < 2**BLOCKS:
            raise ValueError(
                f"{name}: expected image_size of at least {2**BLOCKS}, which {BLOCKS} poolings "
                f"bring to one pixel, got {image_size}"
            )
        self.image_size, self.channels = image_size, channels
        self.features = filters * (image_size // 2**BLOCKS) ** 2
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        layers: list[nn.Module] = []
        for block in range(BLOCKS):
            inputs = filters if block else channels
            layers += [
                nn.Conv2d(inputs, filters, 3, padding=1, **factory),
                nn.BatchNorm2d(filters, **factory),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.embedding = nn.Sequential(*layers, nn.Flatten())

    def forward(
        self, support: Tensor, support_labels: Tensor, queries: Tensor, ways: int | None = None
    ) -> Tensor:
        """Classify queries after one look at the support examples.

        Args:
            support: (S, C, H, W).
            support_labels: (S,) int64, 0 to ways - 1, each at least once.
            queries: (Q, C, H, W).
            ways: classes of the task; None: one more than the largest label.

        Returns:
            logits (Q, ways).

        Raises:
            ValueError, TypeError: an input does not fit; the message says how.
        """
        self._check(support, support_labels, queries)
        ways = int(support_labels.max()) + 1 if ways is None else ways
        # All together, so that batch normalisation sees the whole task.
        embedded = self.embedding(torch.cat([support, queries]))
        shown, asked = embedded.split([len(support), len(queries)])
        one_hot = F.one_hot(support_labels, ways).to(embedded.dtype)
        return self._compare(shown, one_hot, asked)

    def _compare(self, support: Tensor, one_hot: Tensor, queries: Tensor) -> Tensor:
        """Embedded support (S, F), its labels (S, N) and embedded queries (Q, F) -> logits."""
        raise NotImplementedError

    def _check(self, support: Tensor, support_labels: Tensor, queries: Tensor) -> None:
        name, shape = type(self).__name__, (self.channels, self.image_size, self.image_size)
        for argument, images in (("support", support), ("queries", queries)):
            if images.dim() != 4 or tuple(images.shape[1:]) != shape:
                raise ValueError(
                    f"{name}: expected {argument} of shape (images, {', '.join(map(str, shape))}), "
                    f"got {tuple(images.shape)}"
                )
        if support_labels.dtype != torch.long:
            raise TypeError(
                f"{name}: expected support_labels of dtype int64, got {support_labels.dtype}"
            )
        if len(support) == 0 or support_labels.shape != support.shape[:1]:
            raise ValueError(
                f"{name}: expected support_labels of shape ({len(support)},), one a support "
                f"example and at least one, got {tuple(support_labels.shape)}"
            )


class SiameseNet(_MetricNet):
    """Whether two images are of the same class (Koch, Zemel & Salakhutdinov 2015)::

        p(same | x, x') = sigmoid(b + sum_j a_j |s(f_j(x)) - s(f_j(x'))|)    s the sigmoid

    Its logits are those of p, for each class their mean over its support images. Train it by
    `pair_loss`.

    Args:
        filters: of each convolution.
        image_size: height and width of the images.
        channels: of the images.
        device, dtype: of the parameters.
    """

    def __init__(self, filters: int = 64, image_size: int = 28, **options: Any) -> None:
        super().__init__(filters, image_size, **options)
        self.same = nn.Linear(
            self.features, 1, device=options.get("device"), dtype=options.get("dtype")
        )

    def _compare(self, support: Tensor, one_hot: Tensor, queries: Tensor) -> Tensor:
        distances = (queries.sigmoid().unsqueeze(1) - support.sigmoid()).abs()
        pairs = self.same(distances).squeeze(-1)
        return pairs @ (one_hot / one_hot.sum(0))


class MatchingNet(_MetricNet):
    """Attention over the support images (Vinyals et al. 2016), without full context embeddings::

        p(y | x) = sum_i a_i [y_i = y]      a = softmax_i(cosine(f(x), f(x_i)))

    Its logits are log p.

    Args:
        filters: of each convolution.
        image_size: height and width of the images.
        channels: of the images.
        device, dtype: of the parameters.
    """

    def _compare(self, support: Tensor, one_hot: Tensor, queries: Tensor) -> Tensor:
        cosines = F.normalize(queries, dim=-1) @ F.normalize(support, dim=-1).mT
        return (cosines.softmax(-1) @ one_hot).log()


class PrototypicalNet(_MetricNet):
    """Nearest class means (Snell, Swersky & Zemel 2017)::

        logit of class k = -|f(x) - c_k|^2      c_k = mean of f over the support images of k

    Args:
        filters: of each convolution.
        image_size: height and width of the images.
        channels: of the images.
        device, dtype: of the parameters.
    """

    def _compare(self, support: Tensor, one_hot: Tensor, queries: Tensor) -> Tensor:
        prototypes = (one_hot / one_hot.sum(0)).mT @ support
        return -(queries.unsqueeze(1) - prototypes).square().sum(-1)


def pair_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of "same class or not" over all pairs of a query and a class, in which the
    pairs of the same class weigh as much as all others.

    Args:
        logits: (Q, N), of "same".
        labels: (Q,) int64, the class of each query.

    Returns:
        The mean over the queries.
    """
    same = F.one_hot(labels, logits.shape[-1]).to(logits.dtype)
    others = max(logits.shape[-1] - 1, 1)
    entropies = F.binary_cross_entropy_with_logits(logits, same, reduction="none")
    return (entropies * (same + (1 - same) / others)).sum(-1).mean() / 2
