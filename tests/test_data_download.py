"""Downloads from a server on this machine that breaks off, forgets and lies."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import socket
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

import mann_ext.data.download as download_module
import mann_ext.data.mnist as mnist_module
import mann_ext.data.omniglot as omniglot_module
from mann_ext import data
from mann_ext.data.download import NetworkError, download

CONTENT = bytes(range(256)) * 4000
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``files`` (one content for every path without a name of its own)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.content = CONTENT
        self.breaks_after: int | None = None  # bytes of an answer
        self.resumes = True
        self.delay = 0.0
        self.asked: list[str | None] = []

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the tests."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.asked.append(asked)
        content = self.server.files.get(self.path.lstrip("/"), self.server.content)
        start = 0
        if asked and self.server.resumes:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        time.sleep(self.server.delay)
        end = len(content)
        if self.server.breaks_after is not None:
            end = min(end, start + self.server.breaks_after)
        self.wfile.write(content[start:end])

    def log_message(self, format: str, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_downloaded_once(server, tmp_path):
    target = tmp_path / "new" / "folder" / "file.zip"
    download(server.url, target, MD5)
    download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT
    assert files_in(target.parent) == ["file.zip"]
    assert server.asked == [None]


def test_it_goes_on_where_it_broke_off(server, tmp_path):
    target = tmp_path / "file.zip"
    server.breaks_after = 400_000
    for arrived in (400_000, 800_000):
        with pytest.raises(NetworkError, match=rf"after {arrived:,} of 1,024,000 .*run again"):
            download(server.url, target, MD5)
        assert files_in(tmp_path) == ["file.zip.part"]
    download(server.url, target, MD5)
    assert target.read_bytes() == CONTENT
    assert files_in(tmp_path) == ["file.zip"]
    assert server.asked == [None, "bytes=400000-", "bytes=800000-"]


def test_a_server_that_cannot_resume_sends_it_all_again(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:500])
    server.resumes = False
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def test_a_part_that_was_already_whole_is_used(server, tmp_path):
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("stale", [b"x" * 500, b"x" * len(CONTENT), b"x" * (len(CONTENT) + 9)])
def test_a_wrong_part_does_not_stop_the_next_download(server, tmp_path, stale):
    (tmp_path / "file.zip.part").write_bytes(stale)
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT
    assert files_in(tmp_path) == ["file.zip"]


def test_a_wrong_content_is_refused_and_removed(server, tmp_path):
    server.content = b"<html>log in to this network</html>"
    with pytest.raises(data.DataError, match=f"expected MD5 {MD5}") as caught:
        download(server.url, tmp_path / "file.zip", MD5)
    assert not isinstance(caught.value, NetworkError)
    assert files_in(tmp_path) == []


def test_a_full_disk_is_one_clear_error_and_gets_its_space_back(server, tmp_path, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, content: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "file.zip"
    (tmp_path / "file.zip.part").write_bytes(CONTENT[:500])
    real = Path.open

    def full(path: Path, mode: str = "r", *rest: object) -> object:
        return FullDisk() if path.suffix == ".part" and mode == "ab" else real(path, mode, *rest)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(data.DataError, match=r"file\.zip \(No space left on device\); make room"):
        download(server.url, target, MD5)
    assert files_in(tmp_path) == []


def test_a_failed_rename_leaves_no_file(server, tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(data.DataError, match="Input/output error"):
        download(server.url, tmp_path / "file.zip", MD5)
    assert files_in(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_clear_error(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(data.DataError, match=r"could not write .*another folder") as caught:
        download(server.url, tmp_path / "file" / "x.zip", MD5)
    assert not isinstance(caught.value, NetworkError)
    # Without a network the folder is not what is wrong.
    with pytest.raises(NetworkError):
        download(closed_port(), tmp_path / "file" / "x.zip", MD5)
    assert (tmp_path / "file").read_text() == "in the way"


def test_processes_that_download_the_same_file_wait_for_each_other(server, tmp_path):
    server.delay = 0.1
    target = tmp_path / "file.zip"
    threads = [threading.Thread(target=download, args=(server.url, target, MD5)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert server.asked == [None]


def test_a_server_that_falls_silent_is_a_network_error(server, tmp_path, monkeypatch):
    server.delay = 0.6
    monkeypatch.setattr(download_module, "TIMEOUT", 0.1)
    with pytest.raises(NetworkError, match="timed out"):
        download(server.url, tmp_path / "file.zip", MD5)


def test_it_works_without_rich(server, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "rich.console", None)
    download(server.url, tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == CONTENT


def closed_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"


def test_no_data_and_no_network_says_where_it_looked_or_falls_back(tmp_path, monkeypatch):
    monkeypatch.setattr(omniglot_module, "ADDRESS", closed_port())
    with pytest.raises(data.DataError, match=r"not found in .*refused.*MANN_EXT_DATA"):
        data.Omniglot(tmp_path)
    glyphs = data.synthetic_characters(2)
    monkeypatch.setattr("mann_ext.data.synthetic.synthetic_characters", lambda: glyphs)
    assert data.load_characters(tmp_path) is glyphs
    with pytest.raises(data.DataError, match="not found"):
        data.load_characters(tmp_path, allow_synthetic=False)


def test_damaged_data_never_becomes_synthetic_glyphs(tmp_path):
    (tmp_path / "omniglot.npz").write_bytes(b"damaged")
    with pytest.raises(data.DataError, match="damaged"):
        data.load_characters(tmp_path)


def test_omniglot_is_downloaded_into_the_root_and_read(server, tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    image.new("1", (105, 105), 1).save(file, "PNG")
    digests = {}
    for number, name in enumerate(omniglot_module.ARCHIVES, 1):
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for drawing in range(1, 21):
                path = f"{name}/Alphabet/character{number:02}/{number:04}_{drawing:02}.png"
                archive.writestr(path, file.getvalue())
        server.files[f"{name}.zip"] = packed.getvalue()
        digests[name] = hashlib.md5(packed.getvalue()).hexdigest()
    monkeypatch.setattr(omniglot_module, "ARCHIVES", digests)
    monkeypatch.setattr(omniglot_module, "CLASSES", 2)
    monkeypatch.setattr(omniglot_module, "ADDRESS", server.url)
    found = data.load_characters(tmp_path / "data", allow_synthetic=False)
    assert found.names == ("Alphabet/character01", "Alphabet/character02")
    assert files_in(tmp_path / "data") == ["images_background.zip", "images_evaluation.zip"]
    server.shutdown()  # the second time needs no network
    assert data.load_characters(tmp_path / "data", allow_synthetic=False).names == found.names


def test_mnist_is_downloaded_into_the_root_and_read(server, tmp_path, monkeypatch):
    monkeypatch.setattr(mnist_module, "COUNTS", {"train": 2, "test": 1})
    monkeypatch.setattr(mnist_module, "ADDRESS", closed_port())
    with pytest.raises(data.DataError, match=r"MNIST was not found in .*refused.*MANN_EXT_DATA"):
        data.MNIST(tmp_path)
    images, labels = bytes([0, 0, 8, 3]), bytes([0, 0, 8, 1])
    images += np.array([2, 28, 28], ">i4").tobytes() + bytes(2 * 28 * 28)
    labels += np.array([2], ">i4").tobytes() + bytes([3, 7])
    digests = {}
    for name, content in zip(mnist_module.FILES["train"], (images, labels), strict=True):
        server.files[f"{name}.gz"] = gzip.compress(content)
        digests[name] = hashlib.md5(server.files[f"{name}.gz"]).hexdigest()
    monkeypatch.setattr(mnist_module, "FILES", {"train": digests})
    monkeypatch.setattr(mnist_module, "ADDRESS", server.url)
    assert data.MNIST(tmp_path)[1].tolist() == [3, 7]
    assert files_in(tmp_path) == [f"{name}.gz" for name in digests]
    server.shutdown()  # the second time needs no network
    assert data.MNIST(tmp_path)[1].tolist() == [3, 7]
