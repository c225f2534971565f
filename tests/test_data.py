"""Omniglot in each of its forms, synthetic glyphs, and the episode sampler."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mann_ext.data.omniglot as omniglot_module
from mann_ext import data
from mann_ext.data import episodes as episodes_module


@pytest.fixture(scope="module")
def glyphs() -> data.Characters:
    return data.synthetic_characters(30, seed=3)


def real_data() -> Path:
    root = Path(os.environ.get("MANN_EXT_DATA", ""))
    if not (root / "omniglot.npz").is_file():
        pytest.skip("no omniglot.npz in MANN_EXT_DATA")
    return root


def test_the_real_omniglot_has_1623_classes_split_1200_to_423():
    characters = data.Omniglot(real_data())
    assert characters.images.shape == (1623, 20, 105, 105)
    assert 0.01 < characters.images.float().mean() < 0.15
    training, test = characters.split()
    assert (len(training.names), len(test.names)) == (1200, 423)
    assert not set(training.names) & set(test.names)
    assert data.santoro_test_classes(real_data()) == test.names


def test_synthetic_glyphs_are_the_same_for_the_same_seed(glyphs):
    again = data.synthetic_characters(30, seed=3)
    assert torch.equal(again.images, glyphs.images)
    assert not torch.equal(data.synthetic_characters(30, seed=4).images, glyphs.images)
    # Drawings of a class are alike, not equal; classes differ more.
    flat = F.avg_pool2d(glyphs.images.float(), 5).flatten(2)
    within = (flat[:, 0] - flat[:, 1]).norm(dim=-1).mean()
    between = (flat[:, 0] - flat[:, 0].roll(1, 0)).norm(dim=-1).mean()
    assert 0 < within < 0.9 * between


@pytest.mark.parametrize("labels", ["one_hot", "string"])
def test_episodes_have_the_documented_layout(glyphs, labels):
    sampler = data.EpisodeSampler(glyphs, ways=4, batch_size=3, labels=labels, seed=1)
    batch = sampler.sample()
    assert batch.inputs.shape == (40, 3, sampler.input_size)
    assert (batch.inputs[0, :, 400:] == 0).all()
    pixels = batch.inputs[..., :400]
    assert 0 <= pixels.min() < pixels.max() <= 1
    before = batch.inputs[1:, :, 400:]
    if labels == "one_hot":
        assert torch.equal(before.argmax(-1), batch.targets[:-1])
    else:
        assert batch.targets.shape == (40, 3, 5)
        assert torch.equal(before.unflatten(-1, (5, 5)).argmax(-1), batch.targets[:-1])
    for b in range(3):
        seen: dict[int, int] = {}
        label_of: dict[int, list[int]] = {}
        for t in range(40):
            shown = int(batch.classes[t, b])
            seen[shown] = seen.get(shown, 0) + 1
            assert batch.instances[t, b] == seen[shown]
            target = batch.targets[t, b].tolist()
            assert label_of.setdefault(shown, target) == target
        assert len(seen) <= 4
        assert len({str(x) for x in label_of.values()}) == len(label_of)


def test_classes_get_new_labels_in_every_episode(glyphs):
    sampler = data.EpisodeSampler(glyphs, ways=5, batch_size=64)
    batch = sampler.sample()
    labels = [set(batch.targets[batch.classes == c].tolist()) for c in range(30)]
    assert all(len(x) >= 3 for x in labels)


def test_no_drawing_comes_twice_while_there_are_others(glyphs):
    numbered = torch.zeros(6, 20, 105, 105, dtype=torch.uint8)
    for i in range(20):  # a drawing is told apart by where its ink is, well inside the frame
        numbered[:, i, 40 + i, 50:56] = 1
    characters = data.Characters(numbered, tuple("abcdef"), "test")
    sampler = data.EpisodeSampler(characters, ways=2, length=16, augment=False, batch_size=8)
    batch = sampler.sample()
    assert (batch.instances.amax() <= 20).all()
    sampler = data.EpisodeSampler(glyphs, ways=1, length=20, augment=False, batch_size=4, seed=2)
    pictures = sampler.sample().inputs[..., :400]
    for b in range(4):
        assert len({tuple(p.tolist()) for p in pictures[:, b]}) == 20


def test_a_seed_gives_the_same_batches_and_a_state_goes_on_bit_for_bit(glyphs):
    first, second = (data.EpisodeSampler(glyphs, batch_size=2, seed=5) for _ in range(2))
    assert torch.equal(first.sample().inputs, second.sample().inputs)
    state = first.state_dict()
    copied = pickle.loads(pickle.dumps(first))
    expected = [first.sample() for _ in range(2)]
    third = data.EpisodeSampler(glyphs, batch_size=2, seed=99)
    third.load_state_dict(state)
    for sampler in (third, copied):
        for batch in expected:
            for mine, theirs in zip(sampler.sample(), batch, strict=True):
                assert torch.equal(mine, theirs)


def exact_image(drawing: torch.Tensor, angle: float, shift: tuple[int, int]) -> torch.Tensor:
    """Rotate, shift and shrink to 20 x 20 by bilinear sampling of the box-filtered drawing."""
    smooth = F.avg_pool2d(drawing.float()[None, None], 5, 1, 2)
    line = (torch.arange(20) - 9.5) * 5.25
    y, x = torch.meshgrid(line, line, indexing="ij")
    cos, sin = np.cos(angle), np.sin(angle)
    source = torch.stack([x * cos - y * sin + shift[1], y * cos + x * sin + shift[0]], -1)
    return F.grid_sample(smooth, source[None].float() / 52.5, align_corners=False)[0, 0]


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("shift", [(0, 0), (-10, 7), (3, -1)])
def test_images_are_close_to_an_exact_resampling(glyphs, turn, shift):
    sampler = data.EpisodeSampler(glyphs, batch_size=1)
    errors, contrasts = [], []
    for angle in (0, 40, 127):
        row = ((turn * 128 + angle) * 2 + shift[0] % 2) * 2 + shift[1] % 2
        side = episodes_module._BANK_SIDE
        for index in range(5):
            centre = side // 2
            base = index * side**2 + (centre + (shift[0] >> 1)) * side + centre + (shift[1] >> 1)
            got = sampler._bank[sampler._patterns[row] + base].view(20, 20) / 255
            radians = ((angle + 0.5) / 128 * 2 - 1) * np.pi / 16 + turn * np.pi / 2
            want = exact_image(glyphs.images[0, index], radians, shift)
            errors.append((got - want).abs().mean())
            contrasts.append(want.abs().mean())
    # Half a bank pixel, 0.2 of a result's, off at most; an image shifted by one result's pixel
    # differs by more than its own mean.
    assert sum(errors) < 0.25 * sum(contrasts)


def test_augmentation_stays_in_its_range_and_can_be_turned_off(glyphs):
    dot = torch.zeros(5, 20, 105, 105, dtype=torch.uint8)
    dot[:, :, 50:55, 50:55] = 1  # the centre, which a rotation leaves where it is
    characters = data.Characters(dot, tuple("abcde"), "test")
    place = torch.arange(20.0)

    def centres(augment: bool) -> torch.Tensor:
        pixels = data.EpisodeSampler(characters, augment=augment).sample().inputs[..., :400]
        image = pixels.reshape(-1, 20, 20)
        mass = image.sum((1, 2))
        return torch.stack([(image.sum(2) @ place) / mass, (image.sum(1) @ place) / mass]) - 9.5

    assert centres(False).abs().max() < 0.3
    spread = centres(True).abs()
    assert 1.5 < spread.max() < 10 / 5.25 + 0.4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 0}, "ways of at least 1"),
        ({"ways": 31}, "31-way"),
        ({"length": 0}, "length"),
        ({"labels": "words"}, "labels"),
    ],
)
def test_bad_arguments_are_named(glyphs, options, message):
    with pytest.raises(ValueError, match=message):
        data.EpisodeSampler(glyphs, **options)


def test_nothing_found_and_no_network_says_where_it_looked(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise omniglot_module.urllib.error.URLError("no network")

    monkeypatch.setattr(omniglot_module.urllib.request, "urlopen", refuse)
    with pytest.raises(data.DataError, match=r"not found in .*no network.*MANN_EXT_DATA"):
        data.Omniglot(tmp_path)
    monkeypatch.setattr("mann_ext.data.synthetic.synthetic_characters", lambda: "glyphs")
    assert data.load_characters(tmp_path) == "glyphs"
    with pytest.raises(data.DataError):
        data.load_characters(tmp_path, allow_synthetic=False)


def test_a_download_goes_on_where_it_broke_off_and_is_checked(tmp_path, monkeypatch):
    import hashlib
    import io

    content = b"0123456789" * 1000
    asked = []

    class Stream(io.BytesIO):
        headers: dict[str, str] = {}  # noqa: RUF012
        status = 206

    def serve(request, timeout):
        asked.append(request.headers.get("Range"))
        return Stream(content[4000:])

    monkeypatch.setattr(omniglot_module.urllib.request, "urlopen", serve)
    target = tmp_path / "file.zip"
    (tmp_path / "file.zip.part").write_bytes(content[:4000])
    digest = hashlib.md5(content).hexdigest()
    omniglot_module._download("http://localhost/file.zip", target, digest, [tmp_path])
    assert target.read_bytes() == content
    assert asked == ["bytes=4000-"]
    with pytest.raises(data.DataError, match="MD5"):
        omniglot_module._download("http://localhost/x", tmp_path / "other.zip", digest, [tmp_path])
    assert not list(tmp_path.glob("other*"))


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    class Stream:
        headers: dict[str, str] = {}  # noqa: RUF012
        status = 200

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(omniglot_module.urllib.request, "urlopen", lambda *_, **__: Stream())
    monkeypatch.setattr(omniglot_module, "_copy", full)
    with pytest.raises(data.DataError, match="No space left"):
        omniglot_module._download("http://localhost/x", tmp_path / "a.zip", "0", [tmp_path])
    assert not (tmp_path / "a.zip").exists()


@pytest.mark.parametrize("content", [b"", b"not a zip file", b"PK\x03\x04 truncated"])
def test_a_damaged_file_is_one_clear_error(tmp_path, content):
    (tmp_path / "omniglot.npz").write_bytes(content)
    with pytest.raises(data.DataError, match=r"omniglot\.npz is damaged"):
        data.Omniglot(tmp_path)


def test_the_folder_layout_is_read_as_it_is(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for split, character in (("images_background", "a"), ("images_evaluation", "b")):
        folder = tmp_path / "omniglot-py" / split / "Alphabet" / f"character_{character}"
        folder.mkdir(parents=True)
        for i in range(20):
            pixels = np.full((105, 105), 255, np.uint8)
            pixels[i, 7] = 0
            image.fromarray(pixels).convert("1").save(folder / f"0001_{i + 1:02}.png")
    found = data.Omniglot(tmp_path)
    assert found.names == ("Alphabet/character_a", "Alphabet/character_b")
    assert found.images.sum() == 40
    assert found.images[1, 3, 3, 7] == 1
    next((tmp_path / "omniglot-py").rglob("*_05.png")).write_bytes(b"broken")
    with pytest.raises(data.DataError, match="not a readable image"):
        data.Omniglot(tmp_path)
