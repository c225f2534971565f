"""Checkpoints: tensors as safetensors and everything else as JSON, replaced atomically.

A checkpoint is a folder ``step-000001000`` with ``tensors.safetensors`` and ``state.json``. It is
written under a temporary name, flushed to the disk and renamed, so at any moment the folders with a
final name are whole: whoever kills the process leaves the previous checkpoint to resume from.
Nothing is unpickled, so reading a checkpoint from a stranger runs no code of theirs.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

FORMAT = "mann_ext checkpoint"
VERSION = 1
TENSORS = "tensors.safetensors"
STATE = "state.json"
_NAME = re.compile(r"step-(\d{9,})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says which and what to do."""


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 2) -> Path:
    """Write ``state`` as the checkpoint of ``step`` and remove all but the ``keep`` newest.

    Args:
        folder: where the run's checkpoints are; made if it does not exist.
        step: number of the checkpoint. One that exists is left as it is.
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.
        keep: how many checkpoints stay.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: it could not be written; what was there before is still there, whole.
    """
    target = folder / f"step-{step:09d}"
    if target.is_dir():
        return target
    temporary = folder / f".tmp-{target.name}-{os.getpid()}"
    tensors: dict[str, Tensor] = {}
    plain = _encode(state, "", tensors)
    packed = safetensors.torch.save(tensors)
    header = {
        "format": FORMAT,
        "version": VERSION,
        "step": step,
        "tensors_sha256": hashlib.sha256(packed).hexdigest(),
        "state_sha256": _digest(plain),
        "state": plain,
    }
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write_file(temporary / TENSORS, packed)
        write_file(temporary / STATE, json.dumps(header, indent=1).encode())
        _sync_folder(temporary)
        temporary.rename(target)
        _sync_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        previous = latest(folder)
        rest = f"{previous} is intact" if previous else "there is no earlier one"
        raise CheckpointError(
            f"could not write the checkpoint {target}: {error.strerror or error}; {rest}"
        ) from error
    _prune(folder, keep)
    return target


def load(path: Path) -> dict[str, Any]:
    """Read back what `save` was given, tensors on the CPU.

    Raises:
        CheckpointError: it is missing, truncated, damaged or not a checkpoint.
    """
    damaged = f"{path} is damaged; remove it to go on from the one before, if there is one"
    try:
        header = json.loads((path / STATE).read_bytes())
        packed = (path / TENSORS).read_bytes()
    except ValueError as error:
        raise CheckpointError(f"{damaged} ({STATE}: {error})") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {error}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of mann_ext ({STATE} does not say so)")
    if header.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has format version {header.get('version')}, and this mann_ext reads {VERSION}"
        )
    if hashlib.sha256(packed).hexdigest() != header.get("tensors_sha256"):
        raise CheckpointError(f"{damaged} ({TENSORS} is not what was written)")
    if _digest(header.get("state")) != header.get("state_sha256"):
        raise CheckpointError(f"{damaged} ({STATE} is not what was written)")
    try:
        tensors = safetensors.torch.load(packed)
    except SafetensorError as error:
        raise CheckpointError(f"{damaged} ({TENSORS}: {error})") from None
    state: dict[str, Any] = _decode(header["state"], tensors)
    return state


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in ``folder``, oldest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(
        (path for path in found if (path / STATE).is_file()),
        key=lambda path: int(path.name.removeprefix("step-")),
    )


def latest(folder: Path) -> Path | None:
    """The newest checkpoint in ``folder``, or None."""
    return next(reversed(checkpoints(folder)), None)


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Put ``weights`` into ``module``.

    Raises:
        CheckpointError: they are another model's; names the first parameters that do not fit, and
            ``module`` is left as it was.
    """
    own = module.state_dict()
    wrong = [f"{name} is missing there" for name in own if name not in weights]
    wrong += [f"{name} is unknown here" for name in weights if name not in own]
    wrong += [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(tensor.shape)} here"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source} holds another model: {'; '.join(wrong[:3])}{more}")
    module.load_state_dict(dict(weights))


def write_file(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it.

    Raises:
        OSError: it could not be written; unlike those of ``write`` and ``fsync``, names the file.
    """
    try:
        with open(path, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that at any moment ``path`` is the old file or the new one, whole."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        write_file(temporary, content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    for path in checkpoints(folder)[: -max(keep, 1)]:
        # Without its state.json a folder is no checkpoint, whatever happens next.
        (path / STATE).unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)
    leftovers = [path for path in folder.glob(".tmp-step-*") if path.is_dir()]
    leftovers += [path for path in folder.glob("step-*") if not (path / STATE).is_file()]
    for path in leftovers:
        shutil.rmtree(path, ignore_errors=True)


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """``value`` for JSON, its tensors moved to ``tensors`` under names that say where they were."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"__tensor__": name}
    if isinstance(value, Mapping):
        items = [
            (key, _encode(item, f"{name}.{key}" if name else str(key), tensors))
            for key, item in value.items()
        ]
        if all(isinstance(key, str) for key in value):
            return dict(items)
        return {"__items__": [list(item) for item in items]}
    if isinstance(value, (list, tuple)):
        parts = [_encode(item, f"{name}.{index}", tensors) for index, item in enumerate(value)]
        return {"__tuple__": parts} if isinstance(value, tuple) else parts
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"checkpoint: {name} is a {type(value).__name__}, which has no form in JSON")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "__tensor__" in value:
        return tensors[value["__tensor__"]]
    if "__tuple__" in value:
        return tuple(_decode(item, tensors) for item in value["__tuple__"])
    if "__items__" in value:
        return {key: _decode(item, tensors) for key, item in value["__items__"]}
    return {key: _decode(item, tensors) for key, item in value.items()}


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's random number generators that a run on ``device`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
