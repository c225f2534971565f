"""Few-shot episodes: their layout, randomness, augmentation, and going on after a restart."""

from __future__ import annotations

import doctest
import itertools
import math
import pickle
import statistics
import time
from typing import Literal

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mann_ext import data
from mann_ext.data import episodes as module
from mann_ext.data.episodes import ANGLES, MAX_SHIFT, EpisodeSampler
from mann_ext.models import MANN


class Recorder(EpisodeSampler):
    """Keeps which images a batch shows, (T, B), and their quarter turns."""

    def _draw(self, images: Tensor, index: Tensor, turns: Tensor) -> None:
        self.index, self.turns = index.clone(), turns.clone()
        super()._draw(images, index, turns)


@pytest.fixture(scope="module")
def glyphs() -> data.Characters:
    return data.synthetic_characters(30, seed=3)


def characters_of(drawing: Tensor, classes: int = 5) -> data.Characters:
    """The same drawing (105, 105) for every class."""
    images = drawing.to(torch.uint8).expand(classes, 20, 105, 105)
    return data.Characters(images, tuple(map(str, range(classes))), "test")


def pictures(batch: data.Episodes) -> Tensor:
    return batch.inputs[..., :400].unflatten(-1, (20, 20))


def centres(images: Tensor) -> Tensor:
    """Centres of mass (..., 2), y and x, from the middle, in pixels of the 105."""
    place = (torch.arange(20) - 9.5) * 5.25
    mass = images.sum((-1, -2))
    y, x = images.sum(-1) @ place, images.sum(-2) @ place
    return torch.stack([y / mass, x / mass], -1)


def assert_consistent(batch: data.Episodes, ways: int) -> None:
    """Labels, instances and classes fit each other in every episode."""
    steps, episodes = batch.classes.shape
    for b in range(episodes):
        seen: dict[int, int] = {}
        label_of: dict[int, str] = {}
        for t in range(steps):
            shown = int(batch.classes[t, b])
            seen[shown] = seen.get(shown, 0) + 1
            assert batch.instances[t, b] == seen[shown]
            label = str(batch.targets[t, b].tolist())
            assert label_of.setdefault(shown, label) == label
        assert len(seen) <= ways
        assert len(set(label_of.values())) == len(label_of)


@pytest.mark.parametrize("labels", ["one_hot", "string"])
def test_episodes_have_the_documented_layout(glyphs, labels):
    sampler = EpisodeSampler(glyphs, ways=4, batch_size=3, labels=labels, seed=1)
    batch = next(iter(sampler))
    assert sampler.label_size == (4 if labels == "one_hot" else 25)
    assert batch.inputs.shape == (40, 3, sampler.input_size)
    assert batch.inputs.dtype == torch.float32
    assert all(x.dtype == torch.int64 for x in batch[1:])
    assert (batch.inputs[0, :, 400:] == 0).all(), "no label comes before the first image"
    assert 0 <= pictures(batch).min() < pictures(batch).max() <= 1
    before = batch.inputs[1:, :, 400:]
    if labels == "one_hot":
        assert torch.equal(before, F.one_hot(batch.targets[:-1], 4).float())
    else:
        assert batch.targets.shape == (40, 3, 5)
        assert batch.targets.unique().tolist() == [0, 1, 2, 3, 4]
        assert torch.equal(before, F.one_hot(batch.targets[:-1], 5).flatten(2).float())
    assert_consistent(batch, 4)


@given(
    ways=st.integers(1, 6),
    length=st.integers(1, 40),
    batch_size=st.integers(1, 4),
    labels=st.sampled_from(["one_hot", "string"]),
    augment=st.booleans(),
    counts=st.lists(st.integers(1, 30), min_size=6, max_size=9),
    seed=st.integers(0, 2**40),
)
def test_any_labels_and_any_images_make_consistent_episodes(
    ways, length, batch_size, labels, augment, counts, seed
):
    generator = torch.Generator().manual_seed(seed)
    class_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)) * 7 - 3
    class_of = class_of[torch.randperm(len(class_of), generator=generator)]
    images = torch.rand(len(class_of), 9, 9, generator=generator)
    sampler = Recorder((images, class_of), ways, length, batch_size, labels, augment, seed)
    batch = sampler.sample()
    assert batch.inputs.shape == (length, batch_size, sampler.input_size)
    assert_consistent(batch, ways)
    shown = class_of.sort(stable=True).values[sampler.index]
    assert torch.equal(shown, batch.classes), "a class is shown by its own images"
    for b in range(batch_size):
        for number in batch.classes[:, b].unique().tolist():
            of_class = sampler.index[batch.classes[:, b] == number, b].tolist()
            have = int((class_of == number).sum())
            rounds = itertools.zip_longest(*[iter(of_class)] * have)
            for once in rounds:  # none twice before all came
                once = [i for i in once if i is not None]
                assert len(set(once)) == len(once)


def test_images_show_the_drawings_of_their_class():
    # Drawing j of class i is a square at its own place.
    images = torch.zeros(6, 20, 105, 105, dtype=torch.uint8)
    for i, j in itertools.product(range(6), range(20)):
        images[i, j, 10 + 15 * i : 20 + 15 * i, 5 + 4 * j : 15 + 4 * j] = 1
    sampler = Recorder(data.Characters(images, tuple("abcdef"), "test"), ways=3, augment=False)
    batch = sampler.sample()
    drawing = sampler.index % 20
    assert torch.equal(sampler.index // 20, batch.classes)
    y, x = 14.5 + 15 * batch.classes - 52, 9.5 + 4 * drawing - 52
    for turn, (up, left) in enumerate([(y, x), (-x, y), (-y, -x), (x, -y)]):
        here = sampler.turns == turn
        expected = torch.stack([up, left], -1)[here]
        assert (centres(pictures(batch))[here] - expected).abs().max() < 1.6


def test_every_class_and_drawing_is_shown_as_often_as_any_other(glyphs):
    sampler = Recorder(glyphs, ways=5, batch_size=200)
    batches = [sampler.sample() for _ in range(6)]
    classes = torch.stack([b.classes for b in batches])
    # Chosen per episode: 1,200 episodes of 5 in 30, 200 times each; 5 sigma = 65.
    chosen = torch.zeros(30)
    for episode in classes.transpose(1, 2).flatten(0, 1):
        chosen[episode.unique()] += 1
    assert (chosen - 200).abs().max() < 65
    # First drawing shown of a class: 20 equally likely, about 300 times each; 5 sigma = 85.
    first = sampler.index[batches[-1].instances == 1] % 20
    expected = len(first) / 20
    assert (first.bincount(minlength=20) - expected).abs().max() < 5 * expected**0.5
    # Steps draw classes independently: their numbers in an episode vary as a binomial's.
    targets = torch.stack([b.targets for b in batches])
    counts = F.one_hot(targets, 5).sum(1).flatten(0, 1).float()  # of 50 steps
    assert counts.mean() == 10
    assert counts.var() == pytest.approx(50 * 0.2 * 0.8, rel=0.1)


@pytest.mark.parametrize("labels", ["one_hot", "string"])
def test_labels_are_new_in_every_episode(
    glyphs: data.Characters, labels: Literal["one_hot", "string"]
) -> None:
    sampler = EpisodeSampler(glyphs, ways=5, batch_size=300, labels=labels)
    batch = sampler.sample()
    seen: dict[int, list[tuple[int, ...]]] = {c: [] for c in range(30)}
    for b in range(300):
        for number in batch.classes[:, b].unique().tolist():
            target = batch.targets[:, b][batch.classes[:, b] == number][0]
            seen[number].append(tuple(target.reshape(-1).tolist()))
    if labels == "one_hot":
        for found in seen.values():  # about 50 episodes a class, 5 labels: 10 each
            assert all(1 <= found.count((label,)) <= 28 for label in range(5))
    else:
        everything = [label for found in seen.values() for label in found]
        assert len(set(everything)) > 0.35 * 3125  # 1,500 draws of 3,125: 38 % expected
        letters = torch.tensor(everything)
        share = F.one_hot(letters, 5).float().mean(0)
        assert (share - 0.2).abs().max() < 0.06


def test_a_class_turns_as_one_in_an_episode_and_anew_in_the_next(glyphs):
    sampler = Recorder(glyphs, ways=5, batch_size=200)
    batch = sampler.sample()
    turns = torch.zeros(4)
    several = set()
    for b in range(200):
        found = {}
        for t in range(50):
            turn = int(sampler.turns[t, b])
            assert found.setdefault(int(batch.classes[t, b]), turn) == turn
        turns += torch.tensor(list(found.values())).bincount(minlength=4)
        several |= set(found.items())
    assert (turns / turns.sum() - 0.25).abs().max() < 0.07  # 1,000 draws, 5 sigma
    assert len(several) > 100  # of 30 classes x 4


def test_shifts_are_uniform_up_to_ten_pixels():
    # In the middle, which turning leaves where it is, and several pixels of the result wide, so
    # that its centre can be measured to less than the pixel by which the bank's entries are off.
    dot = torch.zeros(105, 105)
    dot[40:65, 40:65] = 1
    sampler = EpisodeSampler(characters_of(dot), batch_size=64)
    found = torch.cat([centres(pictures(sampler.sample())).reshape(-1, 2) for _ in range(4)])
    # Shifted first, then turned about the middle, so the shift turns too.
    reach = MAX_SHIFT * (math.cos(math.pi / 16) + math.sin(math.pi / 16))
    assert MAX_SHIFT < found.abs().max() < reach + 1
    for axis in (0, 1):
        mean, spread = found[:, axis].mean(), found[:, axis].std()
        assert mean.abs() < 0.35
        assert spread == pytest.approx(math.sqrt((21**2 - 1) / 12), rel=0.06)
    assert torch.corrcoef(found.mT)[0, 1].abs() < 0.06
    still = EpisodeSampler(characters_of(dot), augment=False).sample()
    assert centres(pictures(still)).abs().max() < 1


def test_rotations_are_uniform_up_to_a_sixteenth_of_pi():
    bar = torch.zeros(105, 105)
    bar[50:55, 17:88] = 1
    sampler = EpisodeSampler(characters_of(bar), batch_size=64)

    def angles(sampler: EpisodeSampler) -> Tensor:
        """Of the bars from the nearest axis."""
        images = pictures(sampler.sample()).flatten(0, 1)
        place = (torch.arange(20) - 9.5) * 5.25
        centre = centres(images)
        dy = place.view(1, 20, 1) - centre[:, 0].view(-1, 1, 1)
        dx = place.view(1, 1, 20) - centre[:, 1].view(-1, 1, 1)
        xy, xx, yy = ((images * m).sum((1, 2)) for m in (dx * dy, dx * dx, dy * dy))
        angle = torch.atan2(2 * xy, xx - yy) / 2
        return (angle + math.pi / 4) % (math.pi / 2) - math.pi / 4

    found = angles(sampler)
    limit = math.pi / 16
    assert found.abs().max() < limit + 0.02
    assert found.mean().abs() < 0.1 * limit
    assert found.std() == pytest.approx(limit / math.sqrt(3), rel=0.06)
    assert angles(EpisodeSampler(characters_of(bar), augment=False)).abs().max() < 1e-3


def exact_image(drawing: Tensor, radians: float, shift: tuple[int, int]) -> Tensor:
    """Turned, shifted and averaged over each of 20 x 20 pixels, from 10 x 10 points a pixel."""
    line = (torch.arange(200) - 99.5) * (105 / 200)
    y, x = torch.meshgrid(line, line, indexing="ij")
    cos, sin = math.cos(radians), math.sin(radians)
    source = torch.stack([x * cos - y * sin + shift[1], y * cos + x * sin + shift[0]], -1)
    fine = F.grid_sample(drawing.float()[None, None], source[None] / 52.5, align_corners=False)
    return F.avg_pool2d(fine, 10)[0, 0]


@pytest.mark.parametrize("turn", range(4))
@pytest.mark.parametrize("shift", [(0, 0), (-10, 7), (3, -1), (10, 10), (-10, -10), (9, -9)])
def test_images_are_close_to_an_exact_resampling(glyphs, monkeypatch, turn, shift):
    sampler = EpisodeSampler(glyphs, batch_size=1)
    indices, angles = torch.arange(0, 600, 25), (torch.arange(24) * 53) % ANGLES
    angles[:2] = torch.tensor([0, ANGLES - 1])
    shifts = (torch.tensor(shift) + MAX_SHIFT).view(2, 1, 1).expand(2, 24, 1)
    drawn = iter([angles.unsqueeze(1), shifts])
    monkeypatch.setattr(sampler, "_integers", lambda *_: next(drawn))
    got = torch.empty(24, 1, 400)
    sampler._draw(got, indices.unsqueeze(1), torch.full((24, 1), turn))
    radians = ((angles + 0.5) / ANGLES * 2 - 1) * math.pi / 16 + turn * math.pi / 2
    drawings = glyphs.images.flatten(0, 1)[indices]
    want = torch.stack(
        [exact_image(d, float(a), shift) for d, a in zip(drawings, radians, strict=True)]
    )
    moved = torch.stack(
        [
            exact_image(d, float(a), (shift[0] + 2, shift[1]))
            for d, a in zip(drawings, radians, strict=True)
        ]
    )
    error = (got.view(-1, 20, 20) - want).square().mean()
    assert -10 * error.log10() > 24  # dB
    # Entries are every second pixel: off by less than a shift of one entry.
    assert error < 0.6 * (moved - want).square().mean()
    assert (got.mean() - want.mean()).abs() < 0.01 * want.mean()


def test_ink_at_the_edge_comes_back_in_no_other_place():
    # The bank's rows and drawings share their margins: nothing may leak from one to the next.
    frame = torch.ones(105, 105)
    empty = torch.zeros(105, 105)
    images = torch.stack([frame, empty]).repeat(10, 1, 1)
    sampler = Recorder((images, torch.arange(20)), ways=20, length=400)
    batch = sampler.sample()
    inked = sampler.index % 2 == 0
    assert (pictures(batch)[~inked] == 0).all()
    full = pictures(batch)[inked]
    # Shifts and turns can bare the outer pixels only.
    assert (full[:, 5:15, 5:15] == 1).all()
    edge = full[:, 0, :].mean(), full[:, -1, :].mean(), full[:, :, 0].mean(), full[:, :, -1].mean()
    assert max(edge) - min(edge) < 0.05


@pytest.mark.parametrize("options", [{}, {"labels": "string"}, {"augment": False}])
def test_a_seed_gives_the_same_batches_and_a_state_goes_on_bit_for_bit(glyphs, options):
    first, second = (EpisodeSampler(glyphs, batch_size=2, seed=5, **options) for _ in range(2))
    assert torch.equal(first.sample().inputs, second.sample().inputs)
    state = first.state_dict()
    saved = pickle.dumps(first)
    expected = [first.sample() for _ in range(2)]
    other = EpisodeSampler(glyphs, batch_size=2, seed=99, **options)
    assert not torch.equal(other.sample().classes, expected[0].classes)
    other.load_state_dict(state)
    for sampler in (other, pickle.loads(saved)):
        for batch in expected:
            for mine, theirs in zip(sampler.sample(), batch, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize("labels", ["one_hot", "string"])
def test_a_curriculum_grows_by_a_class_until_its_end(glyphs, labels):
    growing = {"grow_every": 6, "ways_most": 4, "batch_size": 2, "labels": labels}
    sampler = EpisodeSampler(glyphs, ways=2, seed=3, **growing)
    states, batches = [], []
    for _ in range(12):
        states.append(sampler.state_dict())
        batches.append(sampler.sample())
    # Two episodes a batch: a class more after each three batches.
    assert [len(batch.inputs) for batch in batches] == [20] * 3 + [30] * 3 + [40] * 6
    width = 25 if labels == "string" else 4
    for batch, ways in zip(batches, [2] * 3 + [3] * 3 + [4] * 6, strict=True):
        assert batch.inputs.shape[2] == sampler.input_size == 400 + width, "the same throughout"
        assert_consistent(batch, ways)
        assert max(len(batch.classes[:, b].unique()) for b in range(2)) == ways
    # A state goes on bit for bit, in the middle of the growth too.
    other = EpisodeSampler(glyphs, ways=2, seed=9, **growing)
    other.load_state_dict(states[4])
    copied = pickle.loads(pickle.dumps(other))
    for expected in batches[4:]:
        for again in (other.sample(), copied.sample()):
            for mine, theirs in zip(again, expected, strict=True):
                assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="how many episodes were drawn"):
        other.load_state_dict({"generator": states[0]["generator"]})


def test_a_curriculum_keeps_a_length_that_is_given(glyphs):
    sampler = EpisodeSampler(glyphs, ways=2, length=7, grow_every=1, ways_most=5, batch_size=1)
    assert [len(sampler.sample().inputs) for _ in range(5)] == [7] * 5
    assert sampler.ways == 5


def test_samplers_leave_the_global_random_numbers_alone(glyphs):
    before = torch.get_rng_state()
    EpisodeSampler(glyphs, seed=1).sample()
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_stay_as_they_are_when_the_next_is_drawn(glyphs):
    sampler = EpisodeSampler(glyphs, batch_size=2)
    batch = sampler.sample()
    copies = [x.clone() for x in batch]
    sampler.sample()
    assert all(torch.equal(x, y) for x, y in zip(batch, copies, strict=True))


@pytest.mark.parametrize("state", [{}, {"generator": None}, {"generator": torch.zeros(7)}])
def test_a_state_of_something_else_is_refused_and_changes_nothing(glyphs, state):
    sampler, twin = EpisodeSampler(glyphs, seed=4), EpisodeSampler(glyphs, seed=4)
    for wrong in (state, {"generator": torch.zeros(16, dtype=torch.uint8)}):
        with pytest.raises(ValueError, match=r"expected the state_dict\(\) of a sampler"):
            sampler.load_state_dict(wrong)
    assert torch.equal(sampler.sample().inputs, twin.sample().inputs)


def test_images_of_any_size_and_scale_are_scaled_alike():
    square = torch.zeros(4, 105, 105)
    square[:, 30:75, 45:60] = 1
    class_of = torch.tensor([0, 0, 1, 1])
    sampler = EpisodeSampler((square, class_of), ways=2)
    expected = sampler.sample().inputs
    for images in ((square * 255).to(torch.uint8), square.bool(), square.double() * 0.25):
        assert torch.equal(EpisodeSampler((images, class_of), ways=2).sample().inputs, expected)
    third = F.avg_pool2d(square, 3)
    near = EpisodeSampler((third, class_of), ways=2).sample().inputs
    assert (near - expected).abs().mean() < 0.03
    blank = EpisodeSampler((torch.zeros(2, 8, 8), torch.tensor([0, 1])), ways=2).sample()
    assert (pictures(blank) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 0}, "ways of at least 1, got 0"),
        ({"ways": 31}, "31-way episodes need as many classes, got 30"),
        ({"ways": 3126, "labels": "string"}, "only 3125 strings"),
        ({"length": 0}, "length of at least 1"),
        ({"batch_size": -1}, "batch_size of at least 1"),
        ({"labels": "words"}, "labels 'one_hot' or 'string', got 'words'"),
        ({"grow_every": 5}, "grow_every=5 and ways_most=None"),
        ({"ways_most": 9}, "grow_every=0 and ways_most=9"),
        ({"grow_every": 5, "ways_most": 4}, "ways_most of at least ways=5"),
        ({"grow_every": 5, "ways_most": 31}, "31-way episodes need as many classes, got 30"),
    ],
)
def test_bad_arguments_are_named(glyphs, options, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSampler(glyphs, **options)


@pytest.mark.parametrize(
    ("images", "class_of", "message"),
    [
        (torch.zeros(6, 8, 9), torch.arange(6), r"shape \(M, S, S\), got \(6, 8, 9\)"),
        (torch.zeros(6, 3, 8, 8), torch.arange(6), "average the channels"),
        (torch.zeros(0, 8, 8), torch.arange(0), r"got \(0, 8, 8\)"),
        (torch.zeros(6, 8, 8), torch.arange(5), r"classes of shape \(6,\).*got \(5,\)"),
        (torch.zeros(6, 8, 8), torch.zeros(6), "integer classes, got torch.float32"),
        (torch.full((6, 8, 8), -1.0), torch.arange(6), "finite values from 0"),
        (torch.full((6, 8, 8), math.nan), torch.arange(6), "finite values from 0"),
        (torch.full((6, 8, 8), math.inf), torch.arange(6), "finite values from 0"),
    ],
)
def test_bad_images_and_labels_are_named(images, class_of, message):
    with pytest.raises(ValueError, match=message):
        EpisodeSampler((images, class_of))


def test_a_batch_costs_a_small_part_of_a_training_step(glyphs):
    # About a tenth, on a quiet machine and on a busy one: taken in turn, so that both see the same.
    sampler = EpisodeSampler(glyphs)
    model = MANN(sampler.input_size, sampler.label_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        shares = []
        for _ in range(15):
            start = time.thread_time()  # its own: other processes take turns
            batch = sampler.sample()
            drawn = time.thread_time()
            outputs, _ = model(batch.inputs)
            F.cross_entropy(outputs.flatten(0, 1), batch.targets.flatten()).backward()
            shares.append((drawn - start) / (time.thread_time() - drawn))
    finally:
        torch.set_num_threads(threads)
    assert statistics.median(shares) < 0.25


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_batches_are_made_on_the_gpu(glyphs):
    sampler = EpisodeSampler(glyphs, seed=2, device="cuda")
    batch = sampler.sample()
    assert all(x.is_cuda for x in batch)
    assert_consistent(data.Episodes(*(x.cpu() for x in batch)), 5)
    again = pickle.loads(pickle.dumps(sampler))
    assert torch.equal(again.sample().inputs, sampler.sample().inputs)
    # The same drawings, turns and shifts give the same pixels on either device.
    index, turns = torch.arange(600).view(50, 12), torch.arange(600).view(50, 12) % 4
    images = torch.empty(50, 12, 400, device="cuda")
    plain = EpisodeSampler(glyphs, augment=False, device="cuda")
    plain._draw(images, index.cuda(), turns.cuda())
    expected = torch.empty(50, 12, 400)
    EpisodeSampler(glyphs, augment=False)._draw(expected, index, turns)
    torch.testing.assert_close(images.cpu(), expected)


def test_the_bank_is_averaged_over_a_box(glyphs):
    bank = module._bank(glyphs.images[0], torch.arange(20))
    side, margin = module._BANK_SIDE, module._MARGIN
    images = bank.view(20, side, side)
    assert (images[:, :margin] == 0).all()
    assert (images[:, :, :margin] == 0).all()
    # Entry e is pixel 2 (e - margin) - 1.
    expected = 255 * glyphs.images[0, 7, 39:44, 49:54].float().mean()
    assert images[7, margin + 21, margin + 26] == expected.round()


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


def test_no_shift_and_turn_reaches_past_the_margins():
    # An overrun would show only when the first or last image of a batch met an extreme of both.
    side, margin, centre = module._BANK_SIDE, module._MARGIN, module._CENTRE
    offsets = module._patterns(augment=True)
    columns = (offsets + side // 2) % side - side // 2  # within half a row of the centre
    rows = (offsets - columns) // side
    for offset in (rows, columns):
        assert centre + offset.min() - MAX_SHIFT // 2 >= 0
        assert centre + offset.max() + MAX_SHIFT // 2 < side + margin


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_batches_drawn_in_parts_are_the_same(glyphs, monkeypatch, at_once):
    options = {"batch_size": 3, "length": 11, "seed": 8}  # parts of 1, 2 and 11 steps
    expected = EpisodeSampler(glyphs, **options).sample().inputs
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    assert torch.equal(EpisodeSampler(glyphs, **options).sample().inputs, expected)
