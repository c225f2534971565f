"""miniImageNet (Vinyals et al. 2016), of a user who has its images and lists of classes.

The images are ImageNet's, so there is nothing to download them from.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mann_ext.data.characters import DataError
from mann_ext.data.download import MissingDataError, not_found, search_path

__all__ = ["LabelledImages", "mini_imagenet"]

Part = Literal["train", "val", "test"]
FOLDERS = (".", "miniimagenet", "mini-imagenet", "miniImagenet")


class LabelledImages(NamedTuple):
    """images (M, 3, size, size) uint8; class_of (M,) int64, indices of names."""

    images: Tensor
    class_of: Tensor
    names: tuple[str, ...]


def mini_imagenet(part: Part, root: Path | str | None = None, *, size: int = 84) -> LabelledImages:
    """Colour images of the training (64), validation (16) or test classes (20), 600 a class.

    Looked for in each folder of the search path, and its folder ``miniimagenet`` (or
    ``mini-imagenet``, ``miniImagenet``): ``train.csv``, ``val.csv`` or ``test.csv``, the usual
    lists with the columns filename and label, and beside them the files, in ``images`` or in a
    folder for each label, or in both. They are kept in memory: 21 kB each at 84 pixels.

    Args:
        part: which list.
        root: folder to look in; None: MANN_EXT_DATA, then the user's cache folder.
        size: the images are resized to size x size pixels.

    Raises:
        MissingDataError: there is no such list.
        DataError: the list or an image is missing or damaged, or Pillow is not installed.
        ValueError: ``part`` or ``size`` is out of range.
    """
    if part not in ("train", "val", "test"):
        raise ValueError(f"mini_imagenet: expected part 'train', 'val' or 'test', got {part!r}")
    if size < 1:
        raise ValueError(f"mini_imagenet: expected size of at least 1, got {size}")
    places = search_path(root)
    folders = [place / folder for place in places for folder in FOLDERS]
    lists = [folder / f"{part}.csv" for folder in folders]
    path = next((path for path in lists if path.is_file()), None)
    if path is None:
        wanted = f"{part}.csv (columns filename,label) and the folder images"
        raise MissingDataError(not_found("miniImageNet", places, "it is not downloaded", wanted))
    rows = _read_list(path)
    names = tuple(sorted({label for _, label in rows}))
    number = {name: index for index, name in enumerate(names)}
    images = torch.empty(len(rows), 3, size, size, dtype=torch.uint8)
    for image, (filename, label) in zip(images, rows, strict=True):
        image.copy_(_decode(_find(path, filename, label), size))
    return LabelledImages(images, torch.tensor([number[label] for _, label in rows]), names)


def _read_list(path: Path) -> list[tuple[str, str]]:
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [(row["filename"], row["label"]) for row in reader]
    except KeyError as error:
        raise DataError(
            f"{path}: expected the columns filename and label, without {error}"
        ) from None
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as a list of images ({error})") from error
    for line, row in enumerate(rows, 2):
        if not all(row):
            raise DataError(f"{path}, line {line}: expected a filename and a label, got {row}")
    if not rows:
        raise DataError(f"{path} lists no images")
    return rows


def _find(path: Path, filename: str, label: str) -> Path:
    here = path.parent
    tried = [
        folder / name
        for folder in (here / "images", here)
        for name in (filename, f"{label}/{filename}")
    ]
    found = next((file for file in tried if file.is_file()), None)
    if found is None:
        raise DataError(
            f"{path} lists {filename}, which is in none of {', '.join(map(str, tried))}; put the "
            "images there"
        )
    return found


def _decode(path: Path, size: int) -> Tensor:
    """The image as (3, size, size) uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "reading miniImageNet's images needs Pillow: pip install 'mann_ext[data]'"
        ) from error
    try:
        with Image.open(path) as image:
            pixels = np.asarray(
                image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
            )
    except Exception as error:  # Pillow raises SyntaxError, struct.error and others
        raise DataError(f"{path} is not a readable image ({error}); get it again") from error
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)
