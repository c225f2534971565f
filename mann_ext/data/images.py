"""Images of characters and digits made smaller, turned, or scrambled."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["permute_pixels", "quarter_turns", "shrink"]

_AT_ONCE = 1000  # images, to bound the temporaries


def shrink(images: Tensor, size: int) -> Tensor:
    """Drawings (M, S, S) uint8, 1 = ink -> (M, size, size) uint8, 255 = ink, each pixel the mean of
    what it covers."""
    small = torch.empty(len(images), size, size, dtype=torch.uint8)
    for part, out in zip(images.split(_AT_ONCE), small.split(_AT_ONCE), strict=True):
        means = F.interpolate(
            part.unsqueeze(1).float(), (size, size), mode="bilinear", antialias=True
        )
        out.copy_((means.squeeze(1) * 255).round_())
    return small


def quarter_turns(images: Tensor, class_of: Tensor) -> tuple[Tensor, Tensor]:
    """All images (M, S, S) turned by 0, 90, 180 and 270 degrees, and their classes: a class turned
    is another class."""
    turned = torch.cat([images.rot90(turns, (-2, -1)) for turns in range(4)])
    after = int(class_of.max()) + 1
    return turned, torch.cat([class_of + turns * after for turns in range(4)])


def permute_pixels(images: Tensor, seed: int) -> Tensor:
    """Images (..., S, S), their pixels in another order, the same one for all."""
    pixels = images.shape[-1] * images.shape[-2]
    order = torch.randperm(pixels, generator=torch.Generator().manual_seed(seed))
    return images.flatten(-2)[..., order].view(images.shape)
