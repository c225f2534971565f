"""Omniglot (Lake et al. 2015): 1,623 characters, 20 drawings each, 105 x 105 pixels."""

from __future__ import annotations

import hashlib
import io
import os
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mann_ext.data.characters import Characters, DataError

__all__ = ["MissingDataError", "Omniglot", "santoro_test_classes"]

SIDE = 105
CLASSES = 1623
DRAWINGS = 20
PACKED = "omniglot.npz"
ARCHIVES = {
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
ADDRESS = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"


class MissingDataError(DataError):
    """Omniglot was not found anywhere and could not be downloaded."""


def search_path(root: Path | str | None) -> list[Path]:
    """Where the data is looked for: ``root`` alone if given, else MANN_EXT_DATA, then the cache."""
    if root is not None:
        return [Path(root)]
    places = [Path(os.environ["MANN_EXT_DATA"])] if os.environ.get("MANN_EXT_DATA") else []
    return [*places, cache_folder()]


def cache_folder() -> Path:
    """The user's cache folder for mann_ext."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mann_ext"


def Omniglot(root: Path | str | None = None, *, download: bool = True) -> Characters:
    """All 1,623 classes, in the order of their folders (background, then evaluation).

    Understood, in each folder of the search path: the packed ``omniglot.npz``; torchvision's layout
    (``omniglot-py/images_background/ALPHABET/CHARACTER/*.png``, with or without the outer folder);
    the two public zip archives. Else the archives are downloaded into the cache folder (or
    ``root``), going on where an earlier download broke off, and checked by their MD5.

    Args:
        root: folder to look in; None: MANN_EXT_DATA, then the user's cache folder.
        download: whether to download what is not there.

    Raises:
        MissingDataError: not found, and no download.
        DataError: found, but damaged or not writable; nothing is left half-written.
    """
    places = search_path(root)
    for place in places:
        found = _load_from(place)
        if found is not None:
            return found
    if not download:
        raise MissingDataError(_not_found(places, "downloading was not asked for"))
    target = places[-1]
    for name, md5 in ARCHIVES.items():
        _download(ADDRESS + name + ".zip", target / f"{name}.zip", md5, places)
    found = _load_from(target)
    assert found is not None
    return found


def santoro_test_classes(root: Path | str | None = None) -> tuple[str, ...]:
    """Names of the 423 held-out classes of the fixed split."""
    return Omniglot(root).split()[1].names


def _not_found(places: Iterable[Path], why: str) -> str:
    looked = ", ".join(map(str, places))
    return (
        f"Omniglot was not found in {looked}, and {why}. Put omniglot.npz, the folder omniglot-py, "
        "or images_background.zip and images_evaluation.zip into one of these folders, or set "
        "MANN_EXT_DATA to where they are"
    )


def _load_from(place: Path) -> Characters | None:
    if (place / PACKED).is_file():
        return _load_packed(place / PACKED)
    for base in (place / "omniglot-py", place):
        folders = [base / name for name in ARCHIVES]
        if all(folder.is_dir() for folder in folders):
            files = {
                str(path.relative_to(base)): path for f in folders for path in f.rglob("*.png")
            }
            return _from_images(base, {name: path.read_bytes for name, path in files.items()})
    archives = [place / f"{name}.zip" for name in ARCHIVES]
    if all(archive.is_file() for archive in archives):
        return _load_archives(place, archives)
    return None


def _load_packed(path: Path) -> Characters:
    try:
        with np.load(path) as file:
            bits, labels = file["images_packed"], file["label"]
            names = file["class_names"]
        if bits.shape != (CLASSES * DRAWINGS, (SIDE * SIDE + 7) // 8) or len(names) != CLASSES:
            raise ValueError(f"unexpected shapes {bits.shape} and {names.shape}")
        order = np.argsort(labels, kind="stable")
        images = np.empty((CLASSES * DRAWINGS, SIDE * SIDE), np.uint8)
        for start in range(0, len(order), 2000):  # bounded temporaries
            rows = order[start : start + 2000]
            images[start : start + 2000] = np.unpackbits(bits[rows], axis=1, count=SIDE * SIDE)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} is damaged or not Omniglot's packed file ({error}); delete it and try again"
        ) from error
    shaped = torch.from_numpy(images).view(CLASSES, DRAWINGS, SIDE, SIDE)
    return Characters(shaped, tuple(map(str, names)), "Omniglot")


def _load_archives(place: Path, archives: list[Path]) -> Characters:
    readers = {}
    for path in archives:
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    if name.endswith(".png"):
                        readers[name] = _constant(archive.read(name))
        except (OSError, zipfile.BadZipFile, EOFError) as error:
            raise DataError(f"{path} is damaged ({error}); delete it and try again") from error
    return _from_images(place, readers)


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _from_images(place: Path, readers: dict[str, Callable[[], bytes]]) -> Characters:
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise DataError(
            "reading Omniglot's PNG files needs Pillow: pip install 'mann_ext[data]'"
        ) from error
    classes: dict[str, list[str]] = {}
    for name in sorted(readers):
        classes.setdefault(str(Path(name).parent), []).append(name)
    images = torch.empty(len(classes), DRAWINGS, SIDE, SIDE, dtype=torch.uint8)
    for i, (folder, names) in enumerate(classes.items()):
        if len(names) != DRAWINGS:
            raise DataError(
                f"{place / folder}: expected {DRAWINGS} drawings, found {len(names)}; "
                "delete the folder and get it again"
            )
        for j, name in enumerate(names):
            try:
                with Image.open(io.BytesIO(readers[name]())) as image:
                    pixels = np.asarray(image.convert("L"))
            except (OSError, UnidentifiedImageError) as error:
                raise DataError(f"{place / name} is not a readable image ({error})") from error
            if pixels.shape != (SIDE, SIDE):
                raise DataError(f"{place / name}: expected 105 x 105 pixels, got {pixels.shape}")
            images[i, j] = torch.from_numpy(pixels < 128)
    if not classes:
        raise DataError(f"{place} holds no PNG files; delete its Omniglot folders and try again")
    # Two levels name a class: alphabet/character.
    return Characters(images, tuple("/".join(Path(n).parts[-2:]) for n in classes), "Omniglot")


def _download(url: str, target: Path, md5: str, places: list[Path]) -> None:
    """Download to a partial file, going on where it broke off; rename it once its MD5 is right."""
    if target.is_file():
        return
    partial = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        start = partial.stat().st_size if partial.exists() else 0
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        with urllib.request.urlopen(request, timeout=30) as response:
            append = response.status == 206
            length = response.headers.get("Content-Length")
            with partial.open("ab" if append else "wb") as file:
                _copy(response, file, int(length) if length else None, target.name)
                file.flush()
                os.fsync(file.fileno())
    except urllib.error.URLError as error:
        raise MissingDataError(
            _not_found(places, f"downloading {url} failed ({error.reason})")
        ) from error
    except TimeoutError as error:
        raise MissingDataError(_not_found(places, f"downloading {url} timed out")) from error
    except OSError as error:
        raise DataError(
            f"could not write {partial} ({error.strerror or error}); free some space or choose "
            "another folder with MANN_EXT_DATA"
        ) from error
    digest = hashlib.md5(partial.read_bytes(), usedforsecurity=False).hexdigest()
    if digest != md5:
        partial.unlink()
        raise DataError(f"{url}: expected MD5 {md5}, got {digest}; try again later")
    partial.replace(target)


def _copy(response: Any, file: BinaryIO, length: int | None, name: str) -> None:
    try:
        from rich.progress import wrap_file
    except ImportError:
        source = response
        while chunk := source.read(1 << 20):
            file.write(chunk)
        return
    with wrap_file(response, total=length or 0, description=name) as source:
        while chunk := source.read(1 << 20):
            file.write(chunk)
