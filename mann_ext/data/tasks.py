"""N-way K-shot tasks: a few labelled images of new classes, and queries to classify by them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from mann_ext.data.sampling import ClassSampler

__all__ = ["TaskSampler", "Tasks"]


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

    Raises:
        ValueError: an argument is out of range, or there are fewer classes than ways, or fewer
            images of a class than shots and queries.

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
        shaped = images if images.dim() == 4 else images.unsqueeze(1)
        self._images = shaped.to(self.device)
        self._rows = class_of.argsort(stable=True).to(self.device)  # images sorted by class

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

    def _floats(self, rows: Tensor) -> Tensor:
        """Images (..., C, H, W) float32."""
        images = self._images[rows]
        return images.float() / 255 if images.dtype == torch.uint8 else images.float()


_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
