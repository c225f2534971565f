"""Glyphs drawn from random strokes: a stand-in where Omniglot cannot be had."""

from __future__ import annotations

import torch
from torch import Tensor

from mann_ext.data.characters import SIDE, Characters

__all__ = ["synthetic_characters"]

STROKES = 4  # at most
POINTS = 100  # along each stroke: the longest take steps of under three pixels, the pen's width
JITTER = 3.0  # pixels, of a stroke's control points from drawing to drawing
PART = 100  # classes drawn at once, to bound the temporaries


def synthetic_characters(classes: int = 1623, drawings: int = 20, seed: int = 0) -> Characters:
    """Characters of one to four curved strokes, each drawing with a hand of its own.

    A stroke is a cubic Bezier curve; a drawing moves its control points by a few pixels and tilts,
    scales and shifts the whole. The same arguments give the same characters.

    Args:
        classes: number of characters.
        drawings: of each.
        seed: of the strokes.

    Returns:
        images (classes, drawings, 105, 105) uint8, as Omniglot's.

    Raises:
        ValueError: fewer than one class or drawing.
    """
    for name, value in (("classes", classes), ("drawings", drawings)):
        if value < 1:
            raise ValueError(f"synthetic_characters: expected {name} of at least 1, got {value}")
    generator = torch.Generator().manual_seed(seed)
    images = torch.zeros(classes, drawings, SIDE, SIDE, dtype=torch.uint8)
    for part in images.split(PART):
        _ink(part, _points(len(part), drawings, generator))
    names = tuple(f"synthetic/{seed}-{i:04}" for i in range(classes))
    return Characters(images, names, "synthetic glyphs")


def _points(classes: int, drawings: int, generator: torch.Generator) -> Tensor:
    """Points along the strokes, (classes, drawings, STROKES * POINTS, 2): y and x in pixels."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) * (high - low) + low

    control = uniform(18, SIDE - 18, classes, 1, STROKES, 4, 2)
    jitter = torch.randn(classes, drawings, STROKES, 4, 2, generator=generator) * JITTER
    number = torch.randint(1, STROKES + 1, (classes, 1), generator=generator)
    # A character with fewer strokes draws its first one again.
    which = torch.arange(STROKES) * (torch.arange(STROKES) < number)
    row = torch.arange(classes).unsqueeze(-1)
    strokes = (control + jitter).transpose(1, 2)[row, which]  # class, stroke, drawing, 4, 2
    time = torch.linspace(0, 1, POINTS).unsqueeze(-1)
    rest = 1 - time
    basis = torch.cat([rest**3, 3 * time * rest**2, 3 * time**2 * rest, time**3], -1)
    points = (basis @ strokes).transpose(1, 2).flatten(2, 3) - SIDE / 2
    angle = uniform(-0.15, 0.15, classes, drawings, 1)
    scale = uniform(0.85, 1.1, classes, drawings, 1)
    shift = uniform(-4, 4, classes, drawings, 1, 2) + SIDE / 2
    cos, sin = angle.cos() * scale, angle.sin() * scale
    y, x = points.unbind(-1)
    return torch.stack([cos * y - sin * x, sin * y + cos * x], -1) + shift


def _ink(images: Tensor, points: Tensor) -> None:
    """Draw the points into blank images with a pen of 3 x 3 pixels."""
    y, x = points.round().long().clamp_(1, SIDE - 2).unbind(-1)
    images.flatten(2).scatter_(2, y * SIDE + x, 1)
    rows = images.clone()
    rows[..., 1:, :] |= images[..., :-1, :]
    rows[..., :-1, :] |= images[..., 1:, :]
    images.copy_(rows)
    images[..., 1:] |= rows[..., :-1]
    images[..., :-1] |= rows[..., 1:]
