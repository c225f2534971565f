"""Tasks of support images and queries, and the data sets they are made from."""

from __future__ import annotations

import csv
import doctest
import gzip
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mann_ext.data.mnist as mnist_module
import mann_ext.data.tasks as tasks_module
from mann_ext import data
from mann_ext.data import TaskSampler
from tests.test_data import real_data


def numbered(counts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose first pixel is the image's number and whose second is its class."""
    class_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    class_of = class_of[torch.randperm(len(class_of), generator=torch.Generator().manual_seed(1))]
    images = torch.zeros(len(class_of), 2, 2)
    images[:, 0, 0] = torch.arange(len(class_of))
    images[:, 0, 1] = class_of
    return images, class_of * 5 - 3


@given(
    counts=st.lists(st.integers(4, 9), min_size=3, max_size=8),
    ways=st.integers(1, 3),
    shots=st.integers(1, 2),
    queries=st.integers(1, 2),
    batch_size=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_a_task_shows_different_images_of_its_classes_under_new_labels(
    counts, ways, shots, queries, batch_size, seed
):
    sampler = TaskSampler(*numbered(counts), ways, shots, queries, batch_size, seed)
    tasks = sampler.sample()
    assert tasks.support.shape == (batch_size, ways * shots, 1, 2, 2)
    assert tasks.queries.shape == (batch_size, ways * queries, 1, 2, 2)
    assert tasks.support.dtype == torch.float32
    assert tasks.query_labels.dtype == torch.int64
    for support, support_labels, shown, labels in zip(*tasks, strict=True):
        images = torch.cat([support, shown])[:, 0, 0]
        label = torch.cat([support_labels, labels])
        assert len(images[:, 0].unique()) == ways * (shots + queries), "none twice"
        assert sorted(label.tolist()) == sorted([*range(ways)] * (shots + queries))
        class_of = {int(label[i]): float(images[i, 1]) for i in range(len(label))}
        assert len(set(class_of.values())) == ways
        assert all(class_of[int(k)] == c for k, c in zip(label, images[:, 1], strict=True))


def test_every_class_and_every_image_comes_as_often_under_every_label():
    images, class_of = numbered([6] * 5)
    sampler = TaskSampler(images, class_of, ways=3, shots=1, queries=1, batch_size=3000)
    tasks = sampler.sample()
    for part, labels in (
        (tasks.support, tasks.support_labels),
        (tasks.queries, tasks.query_labels),
    ):
        of_class = part[:, :, 0, 0, 1].long()
        pairs = (of_class * 3 + labels).flatten().bincount(minlength=15)
        # Each is binomial: 9000 showings, probability 1/15; and of 30 images. Five deviations.
        assert (pairs - 600).abs().max() < 5 * (9000 / 15 * 14 / 15) ** 0.5
        shown = part[:, :, 0, 0, 0].long().flatten().bincount(minlength=30)
        assert (shown - 300).abs().max() < 5 * (9000 / 30 * 29 / 30) ** 0.5


def test_a_seed_gives_the_same_tasks_and_a_state_goes_on_bit_for_bit():
    first, second = (TaskSampler(*numbered([12] * 6), seed=3) for _ in range(2))
    first.sample(), second.sample()
    copied, state = pickle.loads(pickle.dumps(first)), first.state_dict()
    expected = [first.sample() for _ in range(3)]
    for _ in range(2):
        second.sample()
    second.load_state_dict(state)
    for sampler in (second, copied):
        for task in expected:
            assert all(torch.equal(a, b) for a, b in zip(task, sampler.sample(), strict=True))
    other = TaskSampler(*numbered([12] * 6), seed=4).sample()
    assert not torch.equal(other.support, expected[0].support)
    with pytest.raises(ValueError, match=r"TaskSampler: expected the state_dict\(\) of a sampler"):
        first.load_state_dict({"generator": None})


def test_bytes_become_numbers_from_0_to_1():
    images = torch.full((22, 3, 4, 4), 51, dtype=torch.uint8)
    tasks = TaskSampler(images, torch.arange(22) % 2, ways=2).sample()
    assert tasks.queries.shape == (1, 20, 3, 4, 4)
    assert torch.equal(tasks.queries, torch.full_like(tasks.queries, 51 / 255))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 0}, "ways of at least 1, got 0"),
        ({"queries": 0}, "queries of at least 1, got 0"),
        ({"ways": 7}, "7-way tasks need as many classes, got 6"),
        ({"shots": 3}, "3 shots and 10 queries need 13 images .* class 7 has 12; ask for fewer"),
        ({"images": torch.zeros(3, 4)}, r"shape \(M, C, H, W\) or \(M, H, W\), got \(3, 4\)"),
        ({"images": torch.zeros(77, 4, 4, dtype=torch.int64)}, "uint8 or floating point, got"),
        ({"class_of": torch.zeros(5)}, r"integer classes of shape \(77,\), one an image, got"),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, message):
    images, class_of = numbered([13, 13, 12, 13, 13, 13])
    arguments = {"images": images, "class_of": class_of, **options}
    with pytest.raises(ValueError, match=message):
        TaskSampler(**arguments)


def grouped(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `numbered`, with four images a class, and groups of so many classes."""
    images, class_of = numbered([4] * sum(sizes))
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return images, class_of, group[images[:, 0, 1].long()] + 7


def groups_shown(sampler: TaskSampler, group_of: torch.Tensor) -> torch.Tensor:
    """The groups of the classes of a batch of tasks, (B, N)."""
    number = sampler.sample().support[:, :, 0, 0, 0].long()
    return group_of[number]


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_a_share_of_the_tasks_is_of_one_group(share: float) -> None:
    images, class_of, group_of = grouped([3, 2, 5, 10])
    sampler = TaskSampler(
        images, class_of, ways=3, shots=1, queries=1, batch_size=4000, group_of=group_of,
        same_group=share,
    )  # fmt: skip
    shown = groups_shown(sampler, group_of)
    same = (shown == shown[:, :1]).all(1)
    by_chance = (1 + 10 + 120) / 1140  # C(3, 3) + C(5, 3) + C(10, 3) of C(20, 3)
    assert same.double().mean() == pytest.approx(share + (1 - share) * by_chance, abs=0.03)
    if share == 1:
        counts = shown[:, 0].bincount(minlength=11)[7:].double() / 4000
        assert counts.tolist() == pytest.approx([3 / 18, 0, 5 / 18, 10 / 18], abs=0.03)


def test_distorted_images_are_moved_a_little_and_half_of_them_not_at_all() -> None:
    square = torch.zeros(400, 28, 28)
    square[:, 10:18, 10:18] = 1
    sampler = TaskSampler(
        square, torch.arange(400) // 20, ways=20, queries=19, distort=True, seed=1
    )
    images = sampler.sample().queries[0, :, 0]
    moved = (images != square[0]).flatten(1).any(1)
    assert 0.4 < moved.double().mean() < 0.6
    ink = images[moved].sum((1, 2))
    assert 64 * 0.66 < ink.min() < 55  # up to a fifth each way
    assert 75 < ink.max() < 64 * 1.6
    line = torch.arange(28) - 13.5
    centre = (images[moved] * line).sum((1, 2)) / ink
    assert 0.2 < centre.abs().max() < 1  # 2 % of 28 pixels, divided by the scale
    other = TaskSampler(square, torch.arange(400) // 20, ways=20, queries=19, distort=True, seed=1)
    assert torch.equal(other.sample().queries[0, :, 0], images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"same_group": 1.5}, "expected same_group from 0 to 1, got 1.5"),
        ({"same_group": 0.5}, "group_of of shape \\(80,\\), one an image, got none"),
        (
            {"same_group": 0.5, "group_of": torch.zeros(3).long()},
            "got torch.int64 of shape \\(3,\\)",
        ),
        (
            {"same_group": 0.5, "group_of": torch.arange(80)},
            "the images of class -?\\d+ are of several groups",
        ),
        ({"same_group": 0.5, "ways": 11}, "no group has them; ask for fewer ways"),
    ],
)
def test_groups_that_do_not_fit_are_named(options: dict[str, Any], message: str) -> None:
    images, class_of, group_of = grouped([3, 2, 5, 10])
    if "ways" in options:
        options = {**options, "group_of": group_of}
    with pytest.raises(ValueError, match=message):
        TaskSampler(images, class_of, **{"ways": 3, "queries": 1, **options})


def test_the_example_in_the_docstring_is_right():
    assert doctest.testmod(tasks_module).failed == 0


def test_shrinking_keeps_the_ink_where_it_is():
    images = torch.zeros(2, 105, 105, dtype=torch.uint8)
    images[0, 15:45, 60:90] = 1
    small = data.shrink(images, 28)
    assert small.shape == (2, 28, 28)
    assert small.dtype == torch.uint8
    assert small[1].max() == 0
    assert small[0, 6:11, 18:23].min() == 255, "in the middle of the ink"
    mean = images[0].float().mean()
    torch.testing.assert_close(small[0].float().mean() / 255, mean, rtol=0.01, atol=0)
    whole = torch.ones(1, 105, 105, dtype=torch.uint8)
    assert data.shrink(whole, 28).min() == 255


def test_quarter_turns_are_other_classes():
    images, class_of = torch.arange(18.0).view(2, 3, 3), torch.tensor([4, 2])
    turned, classes = data.quarter_turns(images, class_of)
    assert turned.shape == (8, 3, 3)
    assert len(set(classes.tolist())) == 8
    assert classes[:2].tolist() == [4, 2]
    for turns in range(4):
        assert torch.equal(turned[2 * turns + 1], images[1].rot90(turns))


def test_permuted_pixels_are_the_same_ones_in_one_other_order():
    images = torch.arange(50.0).view(2, 5, 5)
    permuted = data.permute_pixels(images, 1)
    assert torch.equal(permuted[1] - permuted[0], torch.full((5, 5), 25.0))
    assert torch.equal(permuted[0].flatten().sort().values, images[0].flatten())
    assert not torch.equal(permuted, images)
    assert torch.equal(permuted, data.permute_pixels(images, 1))
    assert not torch.equal(permuted, data.permute_pixels(images, 2))


def test_the_standard_split_is_by_alphabets():
    characters = data.Omniglot(real_data())
    background, evaluation = characters.split("background")
    assert (len(background.names), len(evaluation.names)) == (964, 659)
    alphabets = [{name.split("/")[0] for name in part.names} for part in (background, evaluation)]
    assert (len(alphabets[0]), len(alphabets[1])) == (30, 20)
    assert not alphabets[0] & alphabets[1]


# MNIST


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """A set of 6 and 4 images, by the names in mnist.npz."""
    monkeypatch.setattr(mnist_module, "COUNTS", {"train": 6, "test": 4})
    random = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 6), ("test", 4)):
        arrays[f"{part}_images"] = random.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}_labels"] = random.integers(0, 10, count, np.uint8)
    return arrays


def idx(array: np.ndarray) -> bytes:
    """An array in the IDX format."""
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    return head + array.tobytes()


def write_idx(arrays: dict[str, np.ndarray], folder: Path, compressed: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, files in mnist_module.FILES.items():
        for name, kind in zip(files, ("images", "labels"), strict=True):
            content = idx(arrays[f"{part}_{kind}"])
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.mark.parametrize("form", ["packed", "idx", "gzip", "torchvision"])
@pytest.mark.parametrize("train", [True, False])
def test_every_form_of_mnist_gives_the_same_digits(digits, tmp_path, form, train):
    if form == "packed":
        np.savez_compressed(tmp_path / "mnist.npz", **digits)
    else:
        folder = tmp_path / "MNIST" / "raw" if form == "torchvision" else tmp_path
        write_idx(digits, folder, form == "gzip")
    images, labels = data.MNIST(tmp_path, train=train, download=False)
    part = "train" if train else "test"
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert np.array_equal(images.numpy(), digits[f"{part}_images"])
    assert np.array_equal(labels.numpy(), digits[f"{part}_labels"])


@pytest.mark.parametrize("content", [b"", b"not a file of numbers", b"PK\x03\x04 truncated"])
@pytest.mark.parametrize("name", ["mnist.npz", "train-images-idx3-ubyte.gz"])
def test_damaged_digits_are_one_clear_error(digits, tmp_path, name, content):
    write_idx(digits, tmp_path, True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(data.DataError, match=f"{name} is damaged or not MNIST's .*delete it"):
        data.MNIST(tmp_path, download=False)


@pytest.mark.parametrize("change", ["one image less", "label 10", "another dtype"])
def test_digits_that_cannot_be_mnist_are_refused(digits, tmp_path, change):
    if change == "one image less":
        digits["train_images"] = digits["train_images"][1:]
    elif change == "label 10":
        digits["train_labels"][0] = 10
    else:
        digits["train_images"] = digits["train_images"].astype(np.int64)
    np.savez_compressed(tmp_path / "mnist.npz", **digits)
    with pytest.raises(data.DataError, match=r"mnist\.npz is damaged"):
        data.MNIST(tmp_path, download=False)


def test_missing_digits_say_where_they_were_looked_for(tmp_path):
    with pytest.raises(data.DataError, match=rf"MNIST was not found in {tmp_path}, and down.*Put"):
        data.MNIST(tmp_path, download=False)


def test_the_real_mnist_has_70000_digits():
    root = real_data()
    if not (root / "mnist.npz").is_file():
        pytest.skip("no mnist.npz in MANN_EXT_DATA")
    for train, first in ((True, [5, 0, 4, 1, 9]), (False, [7, 2, 1, 0, 4])):
        images, labels = data.MNIST(root, train=train)
        assert images.shape == (60_000 if train else 10_000, 28, 28)
        assert labels[:5].tolist() == first


# Lake's one-shot runs


def write_runs(folder: Path) -> torch.Tensor:
    """The public form: query j of run r has a dot at (j, r), its support image at (j, r + 50)."""
    image = pytest.importorskip("PIL.Image")
    same = torch.stack([torch.randperm(20) for _ in range(20)])
    for run in range(20):
        name = f"run{run + 1:02}"
        for part in ("training", "test"):
            (folder / name / part).mkdir(parents=True)
        lines = []
        for j in range(20):
            query, shown = f"item{j + 1:02}.png", f"class{int(same[run, j]) + 1:02}.png"
            for part, file, column in (("test", query, run), ("training", shown, run + 50)):
                pixels = np.full((105, 105), 255, np.uint8)
                pixels[j, column] = 0
                image.fromarray(pixels).convert("1").save(folder / name / part / file)
            lines.append(f"{name}/test/{query} {name}/training/{shown}")
        (folder / name / "class_labels.txt").write_text("\n".join(lines) + "\n")
    return same


@pytest.mark.parametrize("form", ["folder", "inner folder", "archive", "archive of a folder"])
def test_the_public_forms_of_the_runs(tmp_path, form):
    folder = tmp_path / "all_runs" if "inner" in form else tmp_path
    if "archive" in form:
        folder = tmp_path / "unpacked"
    same = write_runs(folder)
    if "archive" in form:
        prefix = "all_runs/" if "of a folder" in form else ""
        with zipfile.ZipFile(tmp_path / "all_runs.zip", "w") as archive:
            for path in folder.rglob("*"):
                archive.write(path, prefix + path.relative_to(folder).as_posix())
    runs = data.one_shot_runs(tmp_path)
    assert torch.equal(runs.labels, same)
    for run in (0, 7, 19):
        for j in (0, 5, 19):
            assert runs.queries[run, j].nonzero().tolist() == [[j, run]]
            assert runs.support[run, same[run, j]].nonzero().tolist() == [[j, run + 50]]


def test_runs_that_are_missing_or_damaged_say_so(tmp_path):
    with pytest.raises(data.DataError, match=r"one-shot runs was not found .*all_runs\.zip"):
        data.one_shot_runs(tmp_path)
    write_runs(tmp_path / "all_runs")
    (tmp_path / "all_runs" / "run03" / "test" / "item05.png").unlink()
    with pytest.raises(data.DataError, match=r"all_runs is damaged .*item05\.png"):
        data.one_shot_runs(tmp_path)
    (tmp_path / "all_runs.zip").write_bytes(b"not a zip file")
    with pytest.raises(data.DataError, match=r"all_runs\.zip is damaged"):
        data.one_shot_runs(tmp_path)
    (tmp_path / "omniglot_oneshot_runs.npz").write_bytes(b"damaged too")
    with pytest.raises(data.DataError, match=r"omniglot_oneshot_runs\.npz is damaged"):
        data.one_shot_runs(tmp_path)


def test_the_real_runs_are_of_the_evaluation_set_and_pixels_do_badly_on_them():
    root = real_data()
    if not (root / "omniglot_oneshot_runs.npz").is_file():
        pytest.skip("no omniglot_oneshot_runs.npz in MANN_EXT_DATA")
    runs = data.one_shot_runs(root)
    evaluation = data.Omniglot(root).split("background")[1].images.flatten(0, 1)
    known = {image.numpy().tobytes() for image in evaluation}
    assert all(image.numpy().tobytes() in known for image in runs.support.flatten(0, 1))
    distances = torch.cdist(runs.queries.flatten(2).float(), runs.support.flatten(2).float())
    accuracy = (distances.argmin(-1) == runs.labels).double().mean()
    # The paper has 21.7 % for pixel kNN on this split; 400 images, five deviations.
    assert abs(accuracy - 0.217) < 5 * (0.217 * 0.783 / 400) ** 0.5


# miniImageNet


def write_mini_imagenet(folder: Path, labels: dict[str, int], by_label: bool = False) -> None:
    """Images of one colour: red is the class, green the image's number in it, blue 9."""
    image = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "test.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["filename", "label"])
        for number, (label, count) in enumerate(labels.items()):
            for i in range(count):
                name = f"{label}{i:08}.png"
                rows.writerow([name, label])
                place = folder / "images" / (f"{label}/{name}" if by_label else name)
                place.parent.mkdir(parents=True, exist_ok=True)
                image.new("RGB", (20, 14), (number, i, 9)).save(place)


@pytest.mark.parametrize("by_label", [False, True])
@pytest.mark.parametrize("place", [".", "miniimagenet", "mini-imagenet"])
def test_mini_imagenet_is_read_by_its_list(tmp_path, by_label, place):
    write_mini_imagenet(tmp_path / place, {"n01": 2, "n07": 3}, by_label)
    images, class_of, names = data.mini_imagenet("test", tmp_path, size=8)
    assert images.shape == (5, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert names == ("n01", "n07")
    assert class_of.tolist() == [0, 0, 1, 1, 1]
    assert images[:, :, 4, 4].tolist() == [[0, 0, 9], [0, 1, 9], [1, 0, 9], [1, 1, 9], [1, 2, 9]]


def test_mini_imagenet_that_is_not_there_says_what_to_put_where(tmp_path):
    with pytest.raises(data.DataError, match=rf"not found in {tmp_path}.*train\.csv .*images"):
        data.mini_imagenet("train", tmp_path)
    with pytest.raises(ValueError, match="expected part 'train', 'val' or 'test', got 'valid'"):
        data.mini_imagenet("valid", tmp_path)
    with pytest.raises(ValueError, match="size of at least 1, got 0"):
        data.mini_imagenet("train", tmp_path, size=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no image", r"test\.csv lists n0100000001\.png, which is in none of"),
        ("broken image", r"n0100000001\.png is not a readable image"),
        (
            "other columns",
            r"test\.csv: expected the columns filename and label, without 'filename'",
        ),
        ("short row", r"test\.csv, line 3: expected a filename and a label"),
        ("empty", r"test\.csv lists no images"),
        ("not text", r"test\.csv cannot be read as a list of images"),
    ],
)
def test_damage_to_mini_imagenet_is_named(tmp_path, change, message):
    write_mini_imagenet(tmp_path, {"n01": 3})
    image, path = tmp_path / "images" / "n0100000001.png", tmp_path / "test.csv"
    if change == "no image":
        image.unlink()
    elif change == "broken image":
        image.write_bytes(b"broken")
    elif change == "other columns":
        path.write_text(path.read_text().replace("filename", "file"))
    elif change == "short row":
        path.write_text(path.read_text().replace("n0100000001.png,n01", "n0100000001.png"))
    elif change == "empty":
        path.write_text("filename,label\n")
    else:
        path.write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(data.DataError, match=message):
        data.mini_imagenet("test", tmp_path)


def test_mini_imagenet_without_pillow_says_what_to_install(tmp_path, monkeypatch):
    write_mini_imagenet(tmp_path, {"n01": 1})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(data.DataError, match=r"pip install 'mann_ext\[data\]'"):
        data.mini_imagenet("test", tmp_path)
