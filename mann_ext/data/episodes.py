"""Few-shot episodes in batches, with the augmentation of Santoro et al. (2016)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mann_ext.data.characters import Characters

__all__ = ["IMAGE_SIZE", "EpisodeSampler", "Episodes"]

IMAGE_SIZE = 20
SIDE = 105
ANGLES = 128  # rotations are drawn from this many evenly spaced ones
MAX_ANGLE = math.pi / 16
MAX_SHIFT = 10  # pixels of the original
LETTERS = 5

# The bank holds every second pixel of the box-filtered drawings, with a margin for what a rotated
# and shifted window can reach: (52.5 (cos + sin) + MAX_SHIFT) pixels from the centre.
_MARGIN = 23
_BANK_SIDE = (SIDE + 2 * _MARGIN) // 2 + 1
_BOX = 5  # about one pixel of the result, 105 / 20


class Episodes(NamedTuple):
    """A batch of episodes.

    inputs (T, B, I) float32: [x_t, y_{t-1}], 400 pixels (ink = 1) and the label before (zeros at
    t = 0); targets (T, B) int64, or (T, B, 5) letters; instances (T, B) int64, 1 for the first time
    a class is shown; classes (T, B) int64, indices into the sampler's characters.
    """

    inputs: Tensor
    targets: Tensor
    instances: Tensor
    classes: Tensor


class EpisodeSampler:
    """Draws batches of N-way episodes, endlessly, from its own random numbers.

    Every episode draws N classes, a quarter turn for each class, and labels anew. Each step shows
    one of the N classes at random (so not all equally often), by a drawing it has not shown while
    there are any left, turned by U(-pi/16, pi/16) and shifted by whole pixels U{-10..10} of the
    105-pixel original, at 20 x 20 pixels.

    For speed an image is not resampled from the original: each of its 400 pixels is the nearest
    entry of a bank of drawings that were averaged over 5 x 5 pixels and kept at every second pixel,
    so a pixel may sit up to 0.2 of its width off, and angles come in 128 steps. A batch is then two
    gathers.

    Args:
        characters: what to draw from.
        ways: N, classes an episode.
        length: T; None: 10 N.
        batch_size: B.
        labels: "one_hot", or "string": five letters a-e, given as 25 numbers.
        augment: rotate by small angles and shift; quarter turns are always drawn.
        seed: of the random numbers.
        device: where the bank is kept and batches are made.

    Raises:
        ValueError: an argument is out of range, or there are fewer classes than ways.
    """

    def __init__(
        self,
        characters: Characters,
        ways: int = 5,
        length: int | None = None,
        batch_size: int = 16,
        labels: Literal["one_hot", "string"] = "one_hot",
        augment: bool = True,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        length = 10 * ways if length is None else length
        for name, value in (("ways", ways), ("length", length), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"EpisodeSampler: expected {name} of at least 1, got {value}")
        if labels not in ("one_hot", "string"):
            raise ValueError(
                f"EpisodeSampler: expected labels 'one_hot' or 'string', got {labels!r}"
            )
        if len(characters.names) < ways:
            raise ValueError(
                f"EpisodeSampler: {ways}-way episodes need as many classes, got "
                f"{len(characters.names)}"
            )
        self.ways, self.length, self.batch_size = ways, length, batch_size
        self.labels, self.augment = labels, augment
        self.device = torch.device(device)
        self.num_classes, self.drawings = characters.images.shape[:2]
        self._bank = _bank(characters.images).to(self.device)
        self._patterns = _patterns(augment).to(self.device)
        self._generator = torch.Generator(self.device).manual_seed(seed)

    @property
    def label_size(self) -> int:
        """Numbers a label takes in the input."""
        return LETTERS * LETTERS if self.labels == "string" else self.ways

    @property
    def input_size(self) -> int:
        """I: 400 pixels and a label."""
        return IMAGE_SIZE**2 + self.label_size

    def state_dict(self) -> dict[str, Any]:
        """All that the coming batches depend on beside the arguments."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, bit for bit, where the sampler that gave ``state`` was."""
        self._generator.set_state(state["generator"].cpu().to(torch.uint8))

    def __iter__(self) -> Iterator[Episodes]:
        while True:
            yield self.sample()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_generator"] = self._generator.get_state()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        generator = torch.Generator(state["device"])
        generator.set_state(state["_generator"])
        self.__dict__.update(state, _generator=generator)

    def sample(self) -> Episodes:
        """The next batch."""
        batch, steps, ways = self.batch_size, self.length, self.ways
        chosen = self._uniform(batch, self.num_classes).topk(ways).indices
        turns = self._integers(4, batch, ways)
        shown = self._integers(ways, steps, batch)  # which of the episode's classes
        one_hot = F.one_hot(shown, ways)
        counts = one_hot.cumsum(0).gather(2, shown.unsqueeze(-1)).squeeze(-1)
        orders = self._uniform(batch, ways, self.drawings).argsort(-1)
        row = torch.arange(batch, device=self.device)
        drawing = orders[row, shown, (counts - 1) % self.drawings]
        classes = chosen[row, shown]
        images = self._images(classes * self.drawings + drawing, turns[row, shown])
        targets, labels = self._labels(shown, one_hot)
        before = torch.cat([labels.new_zeros(1, batch, labels.shape[-1]), labels[:-1]])
        return Episodes(torch.cat([images, before], -1), targets, counts, classes)

    def _uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self._generator, device=self.device)

    def _integers(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self._generator, device=self.device)

    def _images(self, index: Tensor, turns: Tensor) -> Tensor:
        """Drawings ``index`` (T, B), each with its quarter turns -> (T, B, 400)."""
        shape = tuple(index.shape)
        if self.augment:
            angle = self._integers(ANGLES, *shape)
            shift = self._integers(2 * MAX_SHIFT + 1, 2, *shape) - MAX_SHIFT
        else:
            angle = torch.zeros_like(index)
            shift = index.new_zeros(2, *shape)
        half = shift >> 1  # whole bank pixels; what is left picks the pattern
        odd = shift & 1
        angles = ANGLES if self.augment else 1
        pattern = ((turns * angles + angle) * 2 + odd[0]) * 2 + odd[1]
        centre = _BANK_SIDE // 2
        base = index * _BANK_SIDE**2 + (centre + half[0]) * _BANK_SIDE + centre + half[1]
        where = self._patterns.index_select(0, pattern.flatten())
        where += base.reshape(-1, 1)
        pixels = self._bank.index_select(0, where.flatten())
        return (pixels * (1 / 255)).view(*shape, IMAGE_SIZE**2)

    def _labels(self, shown: Tensor, one_hot: Tensor) -> tuple[Tensor, Tensor]:
        """Targets, and the labels as inputs (T, B, label_size). Labels are new in every episode:
        ``shown`` numbers randomly chosen classes in random order, so it serves as the label."""
        if self.labels == "one_hot":
            return shown, one_hot.float()
        strings = self._strings()
        row = torch.arange(self.batch_size, device=self.device)
        letters = strings[row, shown]
        return letters, F.one_hot(letters, LETTERS).flatten(2).float()

    def _strings(self) -> Tensor:
        """Different strings for the classes of each episode, (B, N, 5) letters."""
        codes = self._uniform(self.batch_size, LETTERS**LETTERS).topk(self.ways).indices
        powers = LETTERS ** torch.arange(LETTERS, device=self.device)
        return codes.unsqueeze(-1) // powers % LETTERS


def _bank(images: Tensor) -> Tensor:
    """Drawings averaged over a box, at every second pixel, with a margin: one flat uint8 tensor."""
    flat = images.flatten(0, 1)
    bank = torch.empty(flat.shape[0], _BANK_SIDE, _BANK_SIDE, dtype=torch.uint8)
    margin = (_MARGIN, _MARGIN + 1, _MARGIN, _MARGIN + 1)
    for start in range(0, flat.shape[0], 1000):
        part = F.pad(flat[start : start + 1000].float(), margin).unsqueeze(1)
        part = F.avg_pool2d(part, _BOX, 2, _BOX // 2)[:, 0]  # every second pixel
        bank[start : start + 1000] = (part * 255).round().to(torch.uint8)
    return bank.flatten()


def _patterns(augment: bool) -> Tensor:
    """Offsets into the bank of the 400 pixels, for each quarter turn, angle and odd shift.

    A whole number of bank pixels of shift is left to the caller. Row ((turn * angles + angle) * 2 +
    odd y) * 2 + odd x.
    """
    line = (torch.arange(IMAGE_SIZE) - (IMAGE_SIZE - 1) / 2) * (SIDE / IMAGE_SIZE)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angle = (torch.arange(ANGLES) + 0.5) / ANGLES * 2 * MAX_ANGLE - MAX_ANGLE
    if not augment:
        angle = torch.zeros(1)
    angle = (torch.arange(4).unsqueeze(-1) * (math.pi / 2) + angle).flatten().view(-1, 1, 1, 1, 1)
    odd_y = torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1)
    odd_x = torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1)
    # The bank's centre entry is pixel 2 * (_BANK_SIDE // 2) - _MARGIN of the original.
    middle = (SIDE - 1) / 2 - (2 * (_BANK_SIDE // 2) - _MARGIN)
    from_y = (y * angle.cos() + x * angle.sin() + odd_y + middle) / 2
    from_x = (x * angle.cos() - y * angle.sin() + odd_x + middle) / 2
    return (from_y.round() * _BANK_SIDE + from_x.round()).flatten(-2).flatten(0, 2).long()
