"""The trained models that come with the package: a safetensors file and a card each.

Beside the parameters a file's metadata has two JSON texts: ``model``, the arguments of `MANN`, and
``run``, the configuration, preset and progress of the training, as a checkpoint has them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

_FOLDER = Path(__file__).parents[1] / "pretrained"


def names() -> list[str]:
    return sorted(path.stem for path in _FOLDER.glob("*.safetensors"))


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The parameters, and the metadata's ``model`` and ``run``, of one of `names`."""
    with safe_open(_FOLDER / f"{name}.safetensors", framework="pt") as file:
        parameters = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return parameters, {key: json.loads(text) for key, text in file.metadata().items()}
