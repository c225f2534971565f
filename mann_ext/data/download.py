"""Where data is looked for, and downloads that go on where they broke off, are checked, and appear
whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPException, HTTPResponse
from pathlib import Path

from mann_ext.data.characters import DataError

__all__ = ["MissingDataError", "NetworkError", "download", "not_found", "search_path"]

CHUNK = 1 << 18
TIMEOUT = 30  # seconds without a byte


class NetworkError(DataError):
    """The network or the server failed; what has arrived is kept, to go on from."""


class MissingDataError(DataError):
    """Data was not found anywhere and could not be downloaded."""


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


def not_found(what: str, places: Iterable[Path], why: str, wanted: str) -> str:
    """The message of a `MissingDataError`: ``wanted`` are the files to put there."""
    return (
        f"{what} was not found in {', '.join(map(str, places))}, and {why}. Put {wanted} into one "
        "of these folders, or set MANN_EXT_DATA to where they are"
    )


def download(url: str, target: Path, md5: str) -> None:
    """Download ``url`` to ``target``; nothing to do where that exists.

    What arrives is written to ``target`` + ".part", which a later call continues, and renamed once
    it is whole and its MD5 is right. Processes that download to the same folder wait for each
    other.

    Raises:
        NetworkError: no answer, or the transfer broke off.
        DataError: the folder cannot be written, the disk is full, or the MD5 is another.
    """
    partial = target.with_name(target.name + ".part")
    try:
        with _locked(target.parent):
            if target.exists():
                return
            continued = _size(partial) > 0
            _fetch(url, partial)
            if continued and _md5(partial) != md5:  # the old part may be to blame
                partial.unlink()
                _fetch(url, partial)
            if (got := _md5(partial)) != md5:
                partial.unlink()
                raise DataError(f"{url}: expected MD5 {md5}, got {got}; try again later")
            partial.replace(target)
    except OSError as error:
        with contextlib.suppress(OSError):  # a full disk had better have its space back
            partial.unlink(missing_ok=True)
        if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
            _open(url, 0).close()  # without a network, that is the reason to give
        raise DataError(
            f"could not write {target} ({error.strerror or error}); make room, or choose another "
            "folder for the data"
        ) from error


def _fetch(url: str, partial: Path) -> None:
    """Complete ``partial``."""
    start = _size(partial)
    try:
        response = _open(url, start)
    except NetworkError as error:
        cause = error.__cause__
        if start and isinstance(cause, urllib.error.HTTPError) and cause.code == 416:
            return  # nothing follows what is there
        raise
    with response:
        if response.status != 206:  # the server sends all of it again
            start = 0
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else None
        with (
            partial.open("ab" if start else "wb") as file,
            _progress(partial.stem, start, total) as advance,
        ):
            while chunk := _read(response, url):
                file.write(chunk)
                advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _size(partial) < total:
        raise NetworkError(
            f"{url} broke off after {_size(partial):,} of {total:,} bytes; run again to go on"
        )


def _open(url: str, start: int) -> HTTPResponse:
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response: HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise NetworkError(f"downloading {url} failed ({reason})") from error
    return response


def _read(response: HTTPResponse, url: str) -> bytes:
    try:
        return response.read(CHUNK)
    except (OSError, HTTPException) as error:
        raise NetworkError(f"{url} broke off ({error}); run again to go on") from error


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make ``folder`` and hold it against other processes; closing releases it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _progress(name: str, done: int, total: int | None) -> Iterator[Callable[[int], object]]:
    """A progress bar on the standard error stream, where rich is installed."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield lambda count: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(name, completed=done, total=total)
        yield lambda count: progress.advance(task, count)
