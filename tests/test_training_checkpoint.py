"""Checkpoints: what comes back, what is refused, and that nothing is ever half-written."""

from __future__ import annotations

import json
import multiprocessing
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from mann_ext import checkpoint
from mann_ext.checkpoint import CheckpointError
from tests.tiny_training import assert_same_state


def example() -> dict:
    return {
        "weights": {"a": torch.randn(3, 4), "b": torch.arange(5), "c": torch.tensor(0.5)},
        "half": torch.randn(2, 3).bfloat16(),
        "slice": torch.randn(6, 6)[::2, 1:3],
        "optimiser": {"state": {0: {"step": torch.tensor(3.0)}, 1: {}}, "betas": (0.9, 0.999)},
        "numbers": [1, 0.1 + 0.2, 1e-300, -0.0, True, None, "text"],
        "empty": [{}, [], ()],
    }


def test_everything_comes_back_as_it_was(tmp_path: Path) -> None:
    state = example()
    assert_same_state(checkpoint.load(checkpoint.save(tmp_path, 7, state)), state)


def test_the_newest_are_kept_and_found(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "none") is None
    for step in (5, 10, 1_000_000_000):
        checkpoint.save(tmp_path, step, example(), keep=2)
    names = [path.name for path in checkpoint.checkpoints(tmp_path)]
    assert names == ["step-000000010", "step-1000000000"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-1000000000"


def test_what_a_killed_process_left_is_ignored_and_removed(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, example())
    (tmp_path / ".tmp-step-000000002-99").mkdir()
    (tmp_path / ".tmp-step-000000002-99" / "tensors.safetensors").write_bytes(b"half")
    (tmp_path / "step-000000000").mkdir()  # its removal was cut short
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000000001"
    checkpoint.save(tmp_path, 3, example())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000001", "step-000000003"]


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "missing"])
def test_damage_is_noticed(tmp_path: Path, name: str, damage: str) -> None:
    path = checkpoint.save(tmp_path, 1, example())
    file = path / name
    content = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "flipped":
        # In state.json: a digit of a number, which leaves it valid JSON.
        position = content.rindex(b"0.9") + 2 if name == "state.json" else len(content) - 3
        content[position] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    with pytest.raises(CheckpointError, match="step-000000001"):
        checkpoint.load(path)


@pytest.mark.parametrize("header", [{}, {"format": "other"}, [], {"format": checkpoint.FORMAT}])
def test_other_files_are_refused(tmp_path: Path, header: object) -> None:
    path = checkpoint.save(tmp_path, 1, example())
    (path / "state.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match=r"not a checkpoint|format version"):
        checkpoint.load(path)


def test_what_has_no_form_in_json_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"a\.1 is a object"):
        checkpoint.save(tmp_path, 1, {"a": [1, object()]})
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"could not write .*there is no earlier one"):
        checkpoint.save(tmp_path / "file" / "checkpoints", 1, example())


def _save_two_on_a_full_disk(folder: Path, queue: multiprocessing.Queue) -> None:
    checkpoint.save(folder, 1, example())
    # Writing beyond this size fails half-way, as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    try:
        checkpoint.save(folder, 2, {"large": torch.zeros(100_000)})
    except CheckpointError as error:
        queue.put(str(error))
    else:
        queue.put("")


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    queue = context.Queue()
    process = context.Process(target=_save_two_on_a_full_disk, args=(tmp_path, queue))
    process.start()
    message = queue.get(timeout=60)
    process.join()
    assert "step-000000002" in message
    assert "step-000000001 is intact" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000001"]
    checkpoint.load(tmp_path / "step-000000001")


def test_weights_of_another_model_are_refused_and_change_nothing() -> None:
    module = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = {"weight": torch.ones(4, 3), "extra": torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_weights(module, other, Path("there"))
    assert "bias is missing there" in str(caught.value)
    assert "extra is unknown here" in str(caught.value)
    assert "weight is (4, 3) there and (2, 3) here" in str(caught.value)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    checkpoint.replace_file(path, b"old")
    path.with_name("taken").mkdir()
    with pytest.raises(OSError):
        checkpoint.replace_file(path.with_name("taken"), b"new")
    checkpoint.replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["results.json", "taken"]


def test_random_numbers_go_on_where_they_were() -> None:
    state = checkpoint.random_state(torch.device("cpu"))
    first = torch.rand(3)
    checkpoint.set_random_state(state, torch.device("cpu"))
    assert torch.equal(torch.rand(3), first)
