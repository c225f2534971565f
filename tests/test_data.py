"""Omniglot in each of its forms, damaged ones included, and synthetic glyphs."""

from __future__ import annotations

import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mann_ext.data.omniglot as omniglot_module
from mann_ext import data

FIRST, SECOND = "Zulu/character01", "Alpha/character01"  # numbered against the alphabet


def real_data() -> Path:
    root = Path(os.environ.get("MANN_EXT_DATA", ""))
    if not (root / "omniglot.npz").is_file():
        pytest.skip("no omniglot.npz in MANN_EXT_DATA")
    return root


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A data set of two classes as PNG files by path; drawing j of class i has one dot (j, i)."""
    image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(omniglot_module, "CLASSES", 2)
    files = {}
    for i, folder in enumerate([f"images_background/{FIRST}", f"images_evaluation/{SECOND}"]):
        for j in range(20):
            pixels = np.full((105, 105), 255, np.uint8)
            pixels[j, i] = 0
            file = io.BytesIO()
            image.fromarray(pixels).convert("1").save(file, "PNG")
            files[f"{folder}/{i + 1:04}_{j + 1:02}.png"] = file.getvalue()
    return files


def write_folders(files: dict[str, bytes], base: Path) -> None:
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_bytes(content)


def write_archives(files: dict[str, bytes], base: Path) -> None:
    base.mkdir(parents=True, exist_ok=True)
    for name in ("images_background", "images_evaluation"):
        with zipfile.ZipFile(base / f"{name}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in reversed(files.items()):
                if path.startswith(name):
                    archive.writestr(path, content)
                    archive.writestr("__MACOSX/" + path.replace("/00", "/._00"), b"not an image")


def write_packed(files: dict[str, bytes], base: Path) -> None:
    base.mkdir(parents=True, exist_ok=True)
    images = np.zeros((40, 105, 105), np.uint8)
    for i in range(40):
        images[i, i % 20, i // 20] = 1
    order = np.random.default_rng(0).permutation(40)
    order = order[np.argsort(order % 20, kind="stable")]  # classes mixed, drawings in order
    np.savez_compressed(
        base / "omniglot.npz",
        images_packed=np.packbits(images[order].reshape(40, -1), axis=1),
        label=(order // 20).astype(np.int16),
        class_names=np.array([FIRST, SECOND]),
    )


FORMS = {
    "packed": (write_packed, "."),
    "torchvision": (write_folders, "omniglot-py"),
    "folders": (write_folders, "."),
    "archives": (write_archives, "."),
    "torchvision archives": (write_archives, "omniglot-py"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_in_the_same_order(small, tmp_path, form):
    write, place = FORMS[form]
    write(small, tmp_path / place)
    found = data.Omniglot(tmp_path, download=False)
    expected = torch.zeros(2, 20, 105, 105, dtype=torch.uint8)
    for i in range(2):
        for j in range(20):
            expected[i, j, j, i] = 1
    assert found.names == (FIRST, SECOND)
    assert torch.equal(found.images, expected)
    assert found.source == "Omniglot"


@pytest.mark.parametrize("form", ["folders", "archives"])
def test_an_incomplete_set_is_refused_because_its_split_would_be_another(small, tmp_path, form):
    del small[f"images_evaluation/{SECOND}/0002_07.png"]
    FORMS[form][0](small, tmp_path)
    with pytest.raises(data.DataError, match=r"incomplete, 1 of 40 .*0002_07\.png"):
        data.Omniglot(tmp_path, download=False)


@pytest.mark.parametrize("content", [b"", b"broken", b"\x89PNG\r\n\x1a\n" + bytes(50)])
@pytest.mark.parametrize("form", ["folders", "archives"])
def test_a_broken_image_is_named(small, tmp_path, form, content):
    small[f"images_background/{FIRST}/0001_05.png"] = content
    FORMS[form][0](small, tmp_path)
    with pytest.raises(data.DataError, match=r"0001_05\.png is not a readable image"):
        data.Omniglot(tmp_path, download=False)


def test_an_image_of_another_size_is_named(small, tmp_path):
    image = pytest.importorskip("PIL.Image")
    write_folders(small, tmp_path)
    name = f"images_background/{FIRST}/0001_05.png"
    image.new("L", (28, 28)).save(tmp_path / name)
    with pytest.raises(data.DataError, match=r"0001_05\.png: expected 105 x 105"):
        data.Omniglot(tmp_path, download=False)


def test_png_files_without_pillow_say_what_to_install(small, tmp_path, monkeypatch):
    write_folders(small, tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(data.DataError, match=r"pip install 'mann_ext\[data\]'"):
        data.Omniglot(tmp_path, download=False)


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 truncated", b"\x93NUMPY"])
@pytest.mark.parametrize("name", ["omniglot.npz", "images_background.zip"])
def test_a_damaged_file_is_one_clear_error(small, tmp_path, name, content):
    write_archives(small, tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=f"{name} is damaged or not Omniglot's .*delete it"):
        data.Omniglot(tmp_path, download=False)


@pytest.mark.parametrize("form", ["packed", "archives"])
def test_random_damage_is_found_or_harmless(small, tmp_path, form):
    write, _ = FORMS[form]
    write(small, tmp_path)
    expected = data.Omniglot(tmp_path, download=False).images
    path = next(tmp_path.glob("omniglot.npz"), tmp_path / "images_evaluation.zip")
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for trial in range(150):
        place = int(random.integers(len(whole)))
        damaged = bytearray(whole)
        if trial % 3 == 0:
            del damaged[place:]
        else:
            damaged[place] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            found = data.Omniglot(tmp_path, download=False)
        except data.DataError:
            refused += 1
        else:
            assert torch.equal(found.images, expected), f"byte {place} of {path.name}"
    assert refused > 75


def test_a_file_that_may_not_be_read_says_so(small, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    write_packed(small, tmp_path)
    monkeypatch.setattr(omniglot_module.np, "load", refuse)
    with pytest.raises(data.DataError, match=r"cannot be read \(Permission denied\)"):
        data.Omniglot(tmp_path, download=False)


def test_labels_that_do_not_match_the_drawings_are_refused(small, tmp_path):
    write_packed(small, tmp_path)
    path = tmp_path / "omniglot.npz"
    arrays = dict(np.load(path))
    arrays["label"][0] = 1 - arrays["label"][0]
    np.savez_compressed(path, **arrays)
    with pytest.raises(data.DataError, match="20 of each class"):
        data.Omniglot(tmp_path, download=False)


def test_data_is_looked_for_in_root_else_the_variable_else_the_cache(small, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MANN_EXT_DATA", str(tmp_path / "variable"))
    write_packed(small, tmp_path / "cache" / "mann_ext")
    assert data.Omniglot(download=False).images[0, 1, 1, 0] == 1
    write_packed(small, tmp_path / "variable")
    (tmp_path / "cache" / "mann_ext" / "omniglot.npz").write_bytes(b"not looked at")
    assert data.Omniglot(download=False).images[0, 1, 1, 0] == 1
    (tmp_path / "variable" / "omniglot.npz").write_bytes(b"not looked at")
    write_packed(small, tmp_path / "root")
    assert data.Omniglot(tmp_path / "root", download=False).images[0, 1, 1, 0] == 1
    with pytest.raises(data.DataError, match=r"not found in .*elsewhere"):
        data.Omniglot(tmp_path / "elsewhere", download=False)


def test_the_real_omniglot_has_1623_classes_split_1200_to_423():
    characters = data.Omniglot(real_data())
    assert characters.images.shape == (1623, 20, 105, 105)
    assert characters.names[0] == "Arcadian/character01"  # file 0001_01.png
    assert characters.names[708] == "Alphabet_of_the_Magi/character01"  # file 0709_01.png
    assert 0.05 < characters.images[::7].float().mean() < 0.15
    training, test = characters.split()
    assert (len(training.names), len(test.names)) == (1200, 423)
    assert not set(training.names) & set(test.names)
    assert data.santoro_test_classes(real_data()) == test.names


def test_the_split_stays_the_same():
    # Were torch to change its permutations, results would no longer be comparable.
    numbered = data.Characters(
        torch.zeros(1623, 1, 105, 105, dtype=torch.uint8), tuple(map(str, range(1623))), "test"
    )
    training, test = numbered.split()
    assert training.names[:5] == ("1222", "1583", "602", "418", "995")
    assert test.names[-3:] == ("1436", "1211", "781")


def test_synthetic_glyphs_are_the_same_for_the_same_seed():
    glyphs = data.synthetic_characters(130, seed=3)
    assert glyphs.images.shape == (130, 20, 105, 105)
    assert glyphs.images.dtype == torch.uint8
    assert torch.equal(data.synthetic_characters(130, seed=3).images, glyphs.images)
    assert not torch.equal(data.synthetic_characters(130, seed=4).images, glyphs.images)
    assert len(set(glyphs.names)) == 130
    assert "synthetic" in glyphs.source


def test_synthetic_drawings_are_alike_in_a_class_and_differ_between_classes():
    glyphs = data.synthetic_characters(120, seed=3)
    ink = glyphs.images.flatten(2).sum(-1)
    assert ink.min() >= 9  # a pen's dot
    assert ink.max() < 0.3 * 105**2
    assert (glyphs.images[:, 0] != glyphs.images[:, 1]).flatten(1).any(1).all()
    flat = F.avg_pool2d(glyphs.images.float(), 5).flatten(2)
    within = (flat[:, 0] - flat[:, 1]).norm(dim=-1).mean()
    between = (flat[:, 0] - flat[:, 0].roll(1, 0)).norm(dim=-1).mean()
    assert within < 0.9 * between


def test_synthetic_strokes_have_no_gaps():
    images = data.synthetic_characters(200, 1, seed=1).images[:, 0].bool()
    pieces = []
    for image in images[::20]:
        left = {tuple(p) for p in image.nonzero().tolist()}
        count = 0
        while left:
            count += 1
            edge = [left.pop()]
            while edge:
                y, x = edge.pop()
                around = {(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} & left
                left -= around
                edge += around
        pieces.append(count)
    assert max(pieces) <= 4  # strokes


@given(classes=st.integers(1, 4), drawings=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_any_number_of_synthetic_classes_and_drawings(classes, drawings, seed):
    glyphs = data.synthetic_characters(classes, drawings, seed)
    assert glyphs.images.shape == (classes, drawings, 105, 105)
    assert glyphs.images.flatten(2).any(-1).all()
    training, test = glyphs.split()
    assert sorted(training.names + test.names) == sorted(glyphs.names)


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="classes of at least 1, got 0"):
        data.synthetic_characters(0)
    with pytest.raises(ValueError, match="drawings of at least 1, got -1"):
        data.synthetic_characters(1, -1)
    with pytest.raises(ValueError, match=r"shape \(2, drawings, 105, 105\)"):
        data.Characters(torch.zeros(3, 20, 105, 105), ("a", "b"), "test")
