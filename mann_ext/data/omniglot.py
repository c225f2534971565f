"""Omniglot (Lake et al. 2015): 1,623 characters, 20 drawings each, 105 x 105 pixels."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mann_ext.data.characters import SIDE, Characters, DataError, split_classes
from mann_ext.data.download import MissingDataError, NetworkError, download, not_found, search_path

__all__ = ["Omniglot", "santoro_test_classes"]

CLASSES = 1623
DRAWINGS = 20
PACKED = "omniglot.npz"
ARCHIVES = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"

# images_background/Alphabet_of_the_Magi/character01/0709_01.png: class 709, drawing 1.
_IMAGE = re.compile(r"images_(?:background|evaluation)/([^/]+/[^/]+)/(\d{4})_(\d\d)\.png")


def Omniglot(root: Path | str | None = None, *, download: bool = True) -> Characters:
    """All 1,623 classes, in the order of the numbers in the names of their files.

    Understood, in each folder of the search path: the packed ``omniglot.npz``; torchvision's layout
    (``omniglot-py/images_background/ALPHABET/CHARACTER/*.png``, with or without the outer folder);
    the two public zip archives. All give the same images in the same order, so the same split. Else
    the archives are downloaded into the cache folder (or ``root``), going on where an earlier
    download broke off, and checked by their MD5.

    Args:
        root: folder to look in; None: MANN_EXT_DATA, then the user's cache folder.
        download: whether to download what is not there.

    Returns:
        images (1623, 20, 105, 105) uint8, 1 = ink; names "ALPHABET/CHARACTER".

    Raises:
        MissingDataError: not found, and no download.
        DataError: found, but damaged, incomplete or not writable; nothing is left half-written.
    """
    places = search_path(root)
    for place in places:
        found = _load_from(place)
        if found is not None:
            return found
    if not download:
        raise MissingDataError(_not_found(places, "downloading was not asked for"))
    _download_to(places)
    found = _load_from(places[-1])
    assert found is not None
    return found


def santoro_test_classes(root: Path | str | None = None) -> tuple[str, ...]:
    """Names of the 423 held-out classes of the fixed split (see `Characters.split`)."""
    names = Omniglot(root).names
    return tuple(names[i] for i in split_classes(len(names))[1].tolist())


def _download_to(places: list[Path]) -> None:
    try:
        for name, md5 in ARCHIVES.items():
            download(f"{ADDRESS}{name}.zip", places[-1] / f"{name}.zip", md5)
    except NetworkError as error:
        raise MissingDataError(_not_found(places, str(error))) from error


def _not_found(places: list[Path], why: str) -> str:
    wanted = "omniglot.npz, the folder omniglot-py, or images_background.zip and"
    return not_found("Omniglot", places, why, f"{wanted} images_evaluation.zip")


def _load_from(place: Path) -> Characters | None:
    if (place / PACKED).is_file():
        return _load_packed(place / PACKED)
    bases = (place / "omniglot-py", place)
    for base in bases:
        if all((base / name).is_dir() for name in ARCHIVES):
            return _decode(base, _read_folders(base))
    for base in bases:
        if all((base / f"{name}.zip").is_file() for name in ARCHIVES):
            return _decode(base, _read_archives(base))
    return None


def _load_packed(path: Path) -> Characters:
    try:
        with np.load(path) as file:
            bits, labels, names = (file[k] for k in ("images_packed", "label", "class_names"))
        if bits.shape != (CLASSES * DRAWINGS, (SIDE * SIDE + 7) // 8) or names.shape != (CLASSES,):
            raise ValueError(f"unexpected shapes {bits.shape} and {names.shape}")
        order = np.argsort(labels, kind="stable")
        if not np.array_equal(labels[order], np.repeat(np.arange(CLASSES), DRAWINGS)):
            raise ValueError("its labels are not 20 of each class")
        images = np.empty((CLASSES * DRAWINGS, SIDE * SIDE), np.uint8)
        for start in range(0, len(order), 2000):  # bounded temporaries
            rows = order[start : start + 2000]
            images[start : start + 2000] = np.unpackbits(bits[rows], axis=1, count=SIDE * SIDE)
    except Exception as error:  # damage shows as anything from zlib.error to SyntaxError
        raise _damaged(path, error) from error
    shaped = torch.from_numpy(images).view(CLASSES, DRAWINGS, SIDE, SIDE)
    return Characters(shaped, tuple(map(str, names)), "Omniglot")


def _read_folders(base: Path) -> dict[str, bytes]:
    """PNG files by their path below ``base``."""
    files = {}
    for name in ARCHIVES:
        for path in (base / name).rglob("*.png"):
            try:
                files[path.relative_to(base).as_posix()] = path.read_bytes()
            except OSError as error:
                raise _damaged(path, error) from error
    return files


def _read_archives(base: Path) -> dict[str, bytes]:
    """PNG files in the archives by their path."""
    files = {}
    for name in ARCHIVES:
        path = base / f"{name}.zip"
        try:
            with zipfile.ZipFile(path) as archive:
                pngs = (n for n in archive.namelist() if n.endswith(".png"))
                files.update({n: archive.read(n) for n in pngs})
        except Exception as error:  # as above
            raise _damaged(path, error) from error
    return files


def _damaged(path: Path, error: Exception) -> DataError:
    if isinstance(error, OSError) and error.errno:  # the system's, not the format's
        return DataError(f"{path} cannot be read ({error.strerror}); check its permissions")
    return DataError(f"{path} is damaged or not Omniglot's ({error}); delete it and get it again")


def _decode(base: Path, files: dict[str, bytes]) -> Characters:
    """Omniglot from its PNG files by path, which must be complete."""
    # Folders in alphabetical order would be another order of classes, and so another split.
    found = {}
    for name in files:
        if match := _IMAGE.fullmatch(name):  # not what archivers add, like __MACOSX/._0709_01.png
            found[int(match[2]), int(match[3])] = (match[1], name)
    wanted = [(i, j) for i in range(1, CLASSES + 1) for j in range(1, DRAWINGS + 1)]
    missing = [key for key in wanted if key not in found]
    if missing:
        raise DataError(
            f"{base}: Omniglot is incomplete, {len(missing):,} of {len(wanted):,} drawings are "
            f"missing, such as {missing[0][0]:04}_{missing[0][1]:02}.png; extract or get it again"
        )
    images = np.empty((CLASSES * DRAWINGS, SIDE, SIDE), np.uint8)
    for row, key in enumerate(wanted):
        name = found[key][1]
        images[row] = read_png(base / name, files[name])
    shaped = torch.from_numpy(images).view(CLASSES, DRAWINGS, SIDE, SIDE)
    return Characters(shaped, tuple(found[i, 1][0] for i in range(1, CLASSES + 1)), "Omniglot")


def read_png(path: Path, data: bytes) -> NDArray[np.bool_]:
    """The image in a PNG file, True = ink."""
    try:
        from PIL import Image
    except ImportError as error:
        raise DataError(
            "reading Omniglot's PNG files needs Pillow: pip install 'mann_ext[data]'"
        ) from error
    try:
        with Image.open(io.BytesIO(data)) as image:
            pixels = np.asarray(image.convert("L"))
    except Exception as error:  # Pillow raises SyntaxError, struct.error and others
        raise DataError(f"{path} is not a readable image ({error}); get it again") from error
    if pixels.shape != (SIDE, SIDE):
        raise DataError(f"{path}: expected 105 x 105 pixels, got {pixels.shape}")
    return np.asarray(pixels < 128)
