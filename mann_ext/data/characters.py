"""Sets of drawn characters, real or synthetic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

__all__ = ["SIDE", "TRAINING_CLASSES", "Characters", "DataError", "load_characters"]

SIDE = 105
TRAINING_CLASSES = 1200
BACKGROUND_CLASSES = 964
SPLIT_SEED = 2016
Split = Literal["santoro", "background"]


class DataError(RuntimeError):
    """Data is missing, damaged or cannot be stored; the message says what to do."""


@dataclass(frozen=True)
class Characters:
    """Drawings of characters: images (classes, drawings, 105, 105) uint8, 1 = ink.

    ``names`` has one name a class; ``source`` says what they are, for logs.

    Raises:
        ValueError: the images have another shape, or there is not one name a class.
    """

    images: Tensor
    names: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        shape = tuple(self.images.shape)
        if len(shape) != 4 or shape[2:] != (SIDE, SIDE) or shape[0] != len(self.names):
            raise ValueError(
                f"Characters: expected images of shape ({len(self.names)}, drawings, {SIDE}, "
                f"{SIDE}), one class a name, got {shape}"
            )

    def subset(self, classes: Tensor) -> Characters:
        """Only these classes (indices)."""
        names = tuple(self.names[i] for i in classes.tolist())
        return Characters(self.images[classes], names, self.source)

    def split(self, kind: Split = "santoro") -> tuple[Characters, Characters]:
        """Training and test classes, disjoint.

        "santoro": 1,200 of Omniglot's 1,623 classes are for training, as in Santoro et al. (2016),
        whose own choice was not published: this one takes the classes, in their order in the data
        set, by ``torch.randperm`` with the seed 2016 (``SPLIT_SEED``). "background": its first 964
        classes are, those of the background set of Lake et al. (2015), whose evaluation set has
        other alphabets. Smaller sets keep the proportion.
        """
        training, test = split_classes(len(self.names), kind)
        return self.subset(training), self.subset(test)


def split_classes(classes: int, kind: Split = "santoro") -> tuple[Tensor, Tensor]:
    """Indices of the classes for training and for testing (see `Characters.split`)."""
    count = TRAINING_CLASSES if kind == "santoro" else BACKGROUND_CLASSES
    if classes <= count:
        count = classes * count // 1623
    order = torch.arange(classes)
    if kind == "santoro":
        order = torch.randperm(classes, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[:count], order[count:]


def load_characters(root: Path | str | None = None, *, allow_synthetic: bool = True) -> Characters:
    """Omniglot where it is found or can be downloaded, else synthetic glyphs if they are allowed.

    Raises:
        DataError: Omniglot is damaged, or absent while ``allow_synthetic`` is False.
    """
    from mann_ext.data.download import MissingDataError
    from mann_ext.data.omniglot import Omniglot
    from mann_ext.data.synthetic import synthetic_characters

    try:
        return Omniglot(root)
    except MissingDataError:
        if not allow_synthetic:
            raise
        return synthetic_characters()
