"""Glyphs drawn from random strokes: a stand-in where Omniglot cannot be had."""

from __future__ import annotations

import torch
from torch import Tensor

from mann_ext.data.characters import Characters

__all__ = ["synthetic_characters"]

SIDE = 105
POINTS = 40  # along each stroke
WIDTH = 1.6  # pixels, radius of the pen


def synthetic_characters(classes: int = 1623, drawings: int = 20, seed: int = 0) -> Characters:
    """Characters of one to four curved strokes, each drawing with a hand of its own.

    A stroke is a cubic Bezier curve; a drawing moves its control points by a few pixels and tilts,
    scales and shifts the whole. The same seed gives the same characters.

    Args:
        classes: number of characters.
        drawings: of each.
        seed: of the strokes.

    Returns:
        images (classes, drawings, 105, 105) uint8, as Omniglot's.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    strokes = torch.randint(1, 5, (classes,), generator=generator)
    control = uniform(18, SIDE - 18, classes, 4, 4, 2)  # class, stroke, control point, (y, x)
    time = torch.linspace(0, 1, POINTS).unsqueeze(-1)
    basis = torch.cat(
        [(1 - time) ** 3, 3 * time * (1 - time) ** 2, 3 * time**2 * (1 - time), time**3], -1
    )
    reach = int(WIDTH) + 1
    offsets = torch.cartesian_prod(*[torch.arange(-reach, reach + 1)] * 2)
    offsets = offsets[offsets.square().sum(-1) <= WIDTH**2]
    images = torch.zeros(classes, drawings, SIDE * SIDE, dtype=torch.uint8)
    for i in range(classes):
        number = int(strokes[i])
        jitter = torch.randn(drawings, number, 4, 2, generator=generator) * 3.0
        points = basis @ (control[i, :number] + jitter)  # drawing, stroke, point, (y, x)
        centred = points.flatten(1, 2) - SIDE / 2
        angle, scale = uniform(-0.15, 0.15, drawings, 1), uniform(0.85, 1.1, drawings, 1, 1)
        cos, sin = angle.cos(), angle.sin()
        y, x = centred.unbind(-1)
        turned = torch.stack([cos * y - sin * x, sin * y + cos * x], -1) * scale
        pixels = (turned + SIDE / 2 + uniform(-4, 4, drawings, 1, 2)).round().long()
        inked = (pixels.unsqueeze(-2) + offsets).clamp(0, SIDE - 1).flatten(1, 2)
        images[i].scatter_(1, inked[..., 0] * SIDE + inked[..., 1], 1)
    names = tuple(f"synthetic/{seed}-{i:04}" for i in range(classes))
    return Characters(images.view(classes, drawings, SIDE, SIDE), names, "synthetic glyphs")
