"""MNIST: handwritten digits, 60,000 to train on and 10,000 to test on, 28 x 28 pixels."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mann_ext.data.characters import DataError
from mann_ext.data.download import MissingDataError, NetworkError, download, not_found, search_path

__all__ = ["MNIST"]

PACKED = "mnist.npz"
ADDRESS = "https://ossci-datasets.s3.amazonaws.com/mnist/"
# Images and labels of each part, with the MD5 of their gzip files.
FILES = {
    "train": {
        "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
    },
    "test": {
        "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
        "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
    },
}
COUNTS = {"train": 60_000, "test": 10_000}
SIDE = 28


def MNIST(
    root: Path | str | None = None, *, train: bool = True, download: bool = True
) -> tuple[Tensor, Tensor]:
    """The digits of the training or of the test set.

    Understood, in each folder of the search path: the packed ``mnist.npz``; the four public files,
    as they are or compressed by gzip, also where torchvision keeps them (``MNIST/raw``). Else
    those of this part are downloaded into the cache folder (or ``root``) and checked by their MD5.

    Args:
        root: folder to look in; None: MANN_EXT_DATA, then the user's cache folder.
        train: the training set, else the test set.
        download: whether to download what is not there.

    Returns:
        images (60000 or 10000, 28, 28) uint8, 255 = ink; digits (60000 or 10000,) int64.

    Raises:
        MissingDataError: not found, and no download.
        DataError: found, but damaged, incomplete or not writable; nothing is left half-written.
    """
    part = "train" if train else "test"
    places = search_path(root)
    for place in places:
        found = _load_from(place, part)
        if found is not None:
            return found
    if not download:
        raise MissingDataError(_not_found(places, "downloading was not asked for"))
    _download_to(places, part)
    found = _load_from(places[-1], part)
    assert found is not None
    return found


def _download_to(places: list[Path], part: str) -> None:
    try:
        for name, md5 in FILES[part].items():
            download(f"{ADDRESS}{name}.gz", places[-1] / f"{name}.gz", md5)
    except NetworkError as error:
        raise MissingDataError(_not_found(places, str(error))) from error


def _not_found(places: list[Path], why: str) -> str:
    return not_found("MNIST", places, why, "mnist.npz, or train-images-idx3-ubyte.gz and the like,")


def _load_from(place: Path, part: str) -> tuple[Tensor, Tensor] | None:
    if (place / PACKED).is_file():
        return _checked(place / PACKED, part, *_unpack(place / PACKED, part))
    for folder in (place, place / "MNIST" / "raw"):
        paths = [_either(folder / name) for name in FILES[part]]
        if paths[0] and paths[1]:
            images, labels = (_read_idx(path) for path in paths if path)
            return _checked(paths[0], part, images, labels)
    return None


def _either(path: Path) -> Path | None:
    """The file, or the same compressed."""
    compressed = path.with_name(f"{path.name}.gz")
    return next((file for file in (path, compressed) if file.is_file()), None)


def _unpack(path: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    try:
        with np.load(path) as file:
            return file[f"{part}_images"], file[f"{part}_labels"]
    except Exception as error:  # damage shows as anything from zlib.error to SyntaxError
        raise _damaged(path, error) from error


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """An array in a file of the IDX format: a magic number that ends with the number of dimensions,
    the sizes, and the bytes."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        dimensions = data[3]
        sizes = np.frombuffer(data, ">i4", dimensions, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(sizes)
    except Exception as error:  # as above
        raise _damaged(path, error) from error


def _checked(
    path: Path, part: str, images: NDArray[np.uint8], labels: NDArray[np.uint8]
) -> tuple[Tensor, Tensor]:
    count = COUNTS[part]
    right = images.dtype == labels.dtype == np.uint8
    if not right or images.shape != (count, SIDE, SIDE) or labels.shape != (count,):
        raise _damaged(path, ValueError(f"unexpected shapes {images.shape} and {labels.shape}"))
    if labels.max() > 9:
        raise _damaged(path, ValueError(f"its labels go to {labels.max()}"))
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"{path} is damaged or not MNIST's ({error}); delete it and get it again")
