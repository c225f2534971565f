"""Twenty runs of 20-way one-shot classification (Lake et al. 2015)."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mann_ext.data.characters import SIDE, DataError
from mann_ext.data.download import MissingDataError, not_found, search_path
from mann_ext.data.omniglot import read_png

__all__ = ["OneShotRuns", "one_shot_runs"]

RUNS = 20
CLASSES = 20
PACKED = "omniglot_oneshot_runs.npz"
ARCHIVE = "all_runs.zip"


class OneShotRuns(NamedTuple):
    """support and queries (20 runs, 20 images, 105, 105) uint8, 1 = ink: one image of each of 20
    characters of one alphabet, and one more of each, in another order. labels (20, 20) int64: which
    support image is of the same character as each query."""

    support: Tensor
    queries: Tensor
    labels: Tensor


def one_shot_runs(root: Path | str | None = None) -> OneShotRuns:
    """The runs, of characters of Omniglot's evaluation set.

    Understood, in each folder of the search path: the packed ``omniglot_oneshot_runs.npz``; the
    public ``all_runs.zip``, or what is in it (``run01`` ... ``run20``, each with
    ``class_labels.txt``), with or without the folder ``all_runs``.

    Raises:
        MissingDataError: not found.
        DataError: found, but damaged or incomplete.
    """
    places = search_path(root)
    for place in places:
        if (place / PACKED).is_file():
            return _load_packed(place / PACKED)
        if (place / ARCHIVE).is_file():
            try:
                folder = zipfile.Path(place / ARCHIVE)
            except zipfile.BadZipFile as error:
                raise _damaged(place / ARCHIVE, error) from error
            return _read(folder if (folder / "run01/").exists() else folder / "all_runs")
        for base in (place / "all_runs", place):
            if (base / "run01" / "class_labels.txt").is_file():
                return _read(base)
    wanted = f"{PACKED}, or {ARCHIVE} of github.com/brendenlake/omniglot,"
    raise MissingDataError(
        not_found("Omniglot's one-shot runs", places, "they are not downloaded", wanted)
    )


def _load_packed(path: Path) -> OneShotRuns:
    try:
        with np.load(path) as file:
            parts = [file[name] for name in ("train", "test", "labels")]
    except Exception as error:  # damage shows as anything from zlib.error to SyntaxError
        raise _damaged(path, error) from error
    return _checked(path, *parts)


def _read(folder: Path | zipfile.Path) -> OneShotRuns:
    """The runs from their PNG files. A line of class_labels.txt names a query, such as
    run01/test/item01.png, and its support image, such as run01/training/class19.png."""
    support = np.empty((RUNS, CLASSES, SIDE, SIDE), np.uint8)
    queries, labels = np.empty_like(support), np.empty((RUNS, CLASSES), np.int64)
    try:
        for run in range(RUNS):
            here = folder / f"run{run + 1:02}"
            lines = (here / "class_labels.txt").read_text().split("\n")
            pairs = [line.split() for line in lines if line.strip()]
            shown = sorted(name for _, name in pairs)
            for row, (query, same) in enumerate(pairs):
                queries[run, row] = _pixels(folder / query)
                support[run, row] = _pixels(folder / shown[row])
                labels[run, row] = shown.index(same)
    except (OSError, KeyError, ValueError, IndexError) as error:
        raise _damaged(folder, error) from error
    return _checked(folder, support, queries, labels)


def _pixels(file: Path | zipfile.Path) -> NDArray[np.bool_]:
    return read_png(Path(str(file)), file.read_bytes())


def _checked(
    path: Path | zipfile.Path, support: NDArray[np.generic], queries: NDArray[np.generic],
    labels: NDArray[np.generic],
) -> OneShotRuns:  # fmt: skip
    shape = (RUNS, CLASSES, SIDE, SIDE)
    if support.shape != shape or queries.shape != shape or labels.shape != shape[:2]:
        raise _damaged(path, ValueError(f"unexpected shapes {support.shape}, {labels.shape}"))
    if not (np.sort(labels, 1) == np.arange(CLASSES)).all():
        raise _damaged(path, ValueError("a run has not one query of each character"))
    shown, asked = (torch.from_numpy(part.astype(np.uint8)) for part in (support, queries))
    return OneShotRuns(shown, asked, torch.from_numpy(labels.astype(np.int64)))


def _damaged(path: Path | zipfile.Path, error: Exception) -> DataError:
    return DataError(
        f"{path} is damaged or not the one-shot runs ({error}); delete it and get it again"
    )
