"""N-way K-shot tasks: a few labelled images of new classes, and queries to classify by them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mann_ext.data.sampling import ClassSampler

__all__ = ["TaskSampler", "Tasks"]

# How far images are distorted at most; shifts are shares of half an image.
_MAX_ANGLE = math.pi / 18
_MAX_SHEAR = 0.3
_MAX_GROWTH = 0.2
_MAX_SHIFT = 0.04


class Tasks(NamedTuple):
    """A batch of N-way K-shot tasks with Q queries a class.

    support (B, N K, C, H, W) float32 and support_labels (B, N K) int64 in 0..N-1; queries
    (B, N Q, C, H, W) and query_labels (B, N Q) likewise. Images are numbers from 0 to 1.
    """

    support: Tensor
    support_labels: Tensor
    queries: Tensor
    query_labels: Tensor


class TaskSampler(ClassSampler):
    """Draws batches of N-way K-shot tasks, endlessly, from its own random numbers.

    Every task draws N classes, labels them anew, and draws K support images and Q queries of each,
    all different. Images come class after class, in the order of the labels.

    Args:
        images: (M, C, H, W), or (M, H, W) for one channel; uint8 from 0 to 255, or floating point.
        class_of: the class of each image (M,), any integers; classes may differ in size.
        ways: N, classes a task.
        shots: K, support images a class.
        queries: Q, queries a class.
        batch_size: B, tasks a batch.
        seed: of the random numbers.
        device: where the images are kept and tasks are made.
        group_of: the group of each image (M,), such as its alphabet, any integers; the images of a
            class are all of one group.
        same_group: the share of tasks whose classes are all of one group, from 0 to 1. Groups of
            fewer than ``ways`` classes are left out, larger ones come up more often, in proportion.
        distort: turn every second image, at random, by up to 10 degrees, shear it by up to 0.3,
            make it up to a fifth larger or smaller in each direction, and shift it by up to 2 % of
            its side (Koch et al. 2015). Resampling blurs a little, which is why not all are.

    Raises:
        ValueError: an argument is out of range, or there are fewer classes than ways, or fewer
            images of a class than shots and queries, or no group has as many classes as ways.

    Example:
        >>> import torch
        >>> from mann_ext.data import TaskSampler
        >>> images, class_of = torch.rand(60, 28, 28), torch.arange(60) % 6
        >>> tasks = TaskSampler(images, class_of, ways=5, shots=1, queries=3).sample()
        >>> tasks.support.shape, tasks.queries.shape
        (torch.Size([1, 5, 1, 28, 28]), torch.Size([1, 15, 1, 28, 28]))
    """

    def __init__(
        self,
        images: Tensor,
        class_of: Tensor,
        ways: int = 5,
        shots: int = 1,
        queries: int = 10,
        batch_size: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        group_of: Tensor | None = None,
        same_group: float = 0.0,
        distort: bool = False,
    ) -> None:
        sizes = {"ways": ways, "shots": shots, "queries": queries, "batch_size": batch_size}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"TaskSampler: expected {name} of at least 1, got {value}")
        if images.dim() not in (3, 4) or images.numel() == 0:
            raise ValueError(
                "TaskSampler: expected images of shape (M, C, H, W) or (M, H, W), got "
                f"{tuple(images.shape)}"
            )
        if images.dtype != torch.uint8 and not images.is_floating_point():
            raise ValueError(
                f"TaskSampler: expected images of dtype uint8 or floating point, got {images.dtype}"
            )
        if class_of.shape != images.shape[:1] or class_of.dtype not in _INTEGERS:
            raise ValueError(
                f"TaskSampler: expected integer classes of shape ({len(images)},), one an image, "
                f"got {class_of.dtype} of shape {tuple(class_of.shape)}"
            )
        super().__init__(class_of.long(), seed, device)
        if len(self._numbers) < ways:
            raise ValueError(
                f"TaskSampler: {ways}-way tasks need as many classes, got {len(self._numbers)}"
            )
        if self._fewest < shots + queries:
            poorest = int(self._numbers[self._counts.argmin()])
            raise ValueError(
                f"TaskSampler: {shots} shots and {queries} queries need {shots + queries} images "
                f"of each class, and class {poorest} has {self._fewest}; ask for fewer queries"
            )
        self.ways, self.shots, self.queries, self.batch_size = ways, shots, queries, batch_size
        self.same_group, self.distort = same_group, distort
        self._groups = self._classes_of_groups(class_of, group_of) if same_group else None
        shaped = images if images.dim() == 4 else images.unsqueeze(1)
        self._images = shaped.to(self.device)
        self._rows = class_of.argsort(stable=True).to(self.device)  # images sorted by class

    def _classes_of_groups(self, class_of: Tensor, group_of: Tensor | None) -> Tensor:
        """Which classes (G, C), by their place in ``_numbers``, are of each group that is large
        enough; bool."""
        if not 0 < self.same_group <= 1:
            raise ValueError(f"TaskSampler: expected same_group from 0 to 1, got {self.same_group}")
        if group_of is None or group_of.shape != class_of.shape or group_of.dtype not in _INTEGERS:
            what = "none"
            if group_of is not None:
                what = f"{group_of.dtype} of shape {tuple(group_of.shape)}"
            raise ValueError(
                f"TaskSampler: expected with same_group={self.same_group} integers group_of of "
                f"shape {tuple(class_of.shape)}, one an image, got {what}"
            )
        place = torch.searchsorted(self._numbers.cpu(), class_of.long().cpu())
        groups, group = group_of.cpu().unique(return_inverse=True)
        members = torch.zeros(len(groups), len(self._numbers), dtype=torch.bool)
        members[group, place] = True
        if (members.sum(0) > 1).any():
            mixed = int(self._numbers[members.sum(0).argmax()])
            raise ValueError(f"TaskSampler: the images of class {mixed} are of several groups")
        members = members[members.sum(1) >= self.ways]
        if not len(members):
            raise ValueError(
                f"TaskSampler: {self.ways}-way tasks of one group need as many classes in it, and "
                "no group has them; ask for fewer ways, or same_group=0"
            )
        return members.to(self.device)

    def __iter__(self) -> Iterator[Tasks]:
        while True:
            yield self.sample()

    def sample(self) -> Tasks:
        """The next batch."""
        batch, needed = self.batch_size, self.shots + self.queries
        chosen = self._choose(batch, self.ways)
        drawn = self._starts[chosen].unsqueeze(-1) + self._orders(chosen, needed)
        rows = self._rows[drawn]
        support, queries = (
            self._floats(part.flatten(1)) for part in rows.split([self.shots, self.queries], -1)
        )
        label = torch.arange(self.ways, device=self.device)
        support_labels, query_labels = (
            label.repeat_interleave(count).expand(batch, -1) for count in (self.shots, self.queries)
        )
        return Tasks(support, support_labels, queries, query_labels)

    def _choose(self, batch: int, ways: int) -> Tensor:
        if self._groups is None:
            return super()._choose(batch, ways)
        ranks = self._uniform(batch, len(self._numbers))
        sizes = self._groups.sum(1, dtype=torch.float32)
        group = torch.multinomial(sizes, batch, replacement=True, generator=self._generator)
        other = self._uniform(batch, 1) >= self.same_group
        return ranks.where(self._groups[group] | other, -1).topk(ways).indices

    def _floats(self, rows: Tensor) -> Tensor:
        """Images (..., C, H, W) float32."""
        images = self._images[rows]
        floats = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return self._distorted(floats) if self.distort else floats

    def _distorted(self, images: Tensor) -> Tensor:
        """Images (..., C, H, W), every second one resampled at its own random places."""
        flat = images.flatten(0, -4)
        ranges = 2 * self._uniform(6, len(flat)) - 1
        angle, shear, *rest = (ranges * (self._uniform(len(flat)) < 0.5)).unbind()
        angle, shear = angle * _MAX_ANGLE, shear * _MAX_SHEAR
        wide, high = (1 + _MAX_GROWTH * x for x in rest[:2])
        across, down = (_MAX_SHIFT * x for x in rest[2:])
        cos, sin = angle.cos(), angle.sin()
        rows = (wide * cos, shear * cos - high * sin, across, wide * sin, shear * sin + high * cos)
        places = torch.stack([*rows, down], -1).view(-1, 2, 3)
        grid = F.affine_grid(places, list(flat.shape), align_corners=False)
        return F.grid_sample(flat, grid, align_corners=False).view(images.shape)


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
