"""Sets of drawn characters, real or synthetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["TRAINING_CLASSES", "Characters", "DataError", "load_characters"]

TRAINING_CLASSES = 1200
SPLIT_SEED = 2016


class DataError(RuntimeError):
    """Data is missing, damaged or cannot be stored; the message says what to do."""


@dataclass(frozen=True)
class Characters:
    """Drawings of characters: images (classes, drawings, 105, 105) uint8, 1 = ink.

    ``names`` has one name a class; ``source`` says what they are, for logs.
    """

    images: Tensor
    names: tuple[str, ...]
    source: str

    def subset(self, classes: Tensor) -> Characters:
        """Only these classes (indices)."""
        names = tuple(self.names[i] for i in classes.tolist())
        return Characters(self.images[classes], names, self.source)

    def split(self) -> tuple[Characters, Characters]:
        """Training and test classes, disjoint.

        1,200 of Omniglot's 1,623 classes are for training, as in Santoro et al. (2016), whose own
        choice was not published: this one is a fixed permutation (``SPLIT_SEED``) of the classes in
        their order in the data set. Smaller sets keep the proportion.
        """
        generator = torch.Generator().manual_seed(SPLIT_SEED)
        order = torch.randperm(len(self.names), generator=generator)
        count = TRAINING_CLASSES
        if len(self.names) <= count:
            count = len(self.names) * TRAINING_CLASSES // 1623
        return self.subset(order[:count]), self.subset(order[count:])


def load_characters(root: Path | str | None = None, *, allow_synthetic: bool = True) -> Characters:
    """Omniglot where it is found or can be downloaded, else synthetic glyphs if they are allowed.

    Raises:
        DataError: Omniglot is damaged, or absent while ``allow_synthetic`` is False.
    """
    from mann_ext.data.omniglot import MissingDataError, Omniglot
    from mann_ext.data.synthetic import synthetic_characters

    try:
        return Omniglot(root)
    except MissingDataError:
        if not allow_synthetic:
            raise
        return synthetic_characters()
