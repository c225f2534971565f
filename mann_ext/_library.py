"""Loads the compiled operators and decides, per device, between them and the PyTorch reference.

The choice is a plain module variable, so code that asks ``use_native`` can be traced by
``torch.compile``, which then guards on it. It is one choice for the whole process, all threads.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import TracebackType
from typing import Literal

import torch

BackendName = Literal["auto", "native", "reference"]
BACKENDS: tuple[BackendName, ...] = ("auto", "native", "reference")

LIBRARY_PATH = Path(__file__).with_name("libmann_ext.so")
REINSTALL = "pip install --no-build-isolation -e ."  # in the source folder

# torch's names of the device types that the operators may have kernels for.
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}


def _checked(name: str, source: str) -> BackendName:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _load() -> str:
    """Load the library; returns why that failed, or an empty string."""
    if not LIBRARY_PATH.is_file():
        return "mann_ext was installed without its compiled operators"
    try:
        torch.ops.load_library(str(LIBRARY_PATH))
    except OSError as error:
        return f"the compiled operators in {LIBRARY_PATH} do not load: {error}"
    return ""


def _find_kernels() -> dict[str, frozenset[str]]:
    """Names of the operators that have a native kernel, by device type."""
    kernels = {}
    for device_type, key in _DISPATCH_KEYS.items():
        registered = torch._C._dispatch_get_registrations_for_dispatch_key(key)
        names = [name.split("::", 1)[1] for name in registered if name.startswith("mann_ext::")]
        kernels[device_type] = frozenset(name.split(".")[0] for name in names)
    return kernels


_load_error: str = _load()
_kernels: dict[str, frozenset[str]] = {} if _load_error else _find_kernels()
_backend: BackendName = _checked(os.environ.get("MANN_EXT_BACKEND") or "auto", "MANN_EXT_BACKEND")
_warned: bool = False


def native_available() -> bool:
    """Whether the compiled operators are loaded."""
    return not _load_error


def load_error() -> str:
    """Why the compiled operators are not loaded, or an empty string if they are."""
    return _load_error


def native_operators(device_type: str) -> frozenset[str]:
    """Names of the operators that have a native kernel for ``device_type`` ("cpu", "cuda")."""
    return _kernels.get(device_type, frozenset())


def current_backend() -> BackendName:
    """The backend in force: "auto", "native" or "reference"."""
    return _backend


def use_native(device: torch.device, operator: str | None = None) -> bool:
    """Whether to run the native kernel on ``device``, as the current backend says.

    Args:
        device: where the tensors are. "meta" counts as native, for the operators' fakes run there.
        operator: name of the operator; None asks whether there is any native kernel for the device.

    Returns:
        False for backend "reference"; for "auto", whether there is a kernel; for "native", True.

    Raises:
        RuntimeError: the backend is "native" and there is no such kernel.
    """
    if _backend == "reference":
        return False
    if _load_error:
        found = False
    elif device.type == "meta":
        found = True
    elif operator is None:
        found = len(native_operators(device.type)) > 0
    else:
        found = operator in native_operators(device.type)
    if found:
        return True
    if _backend == "native":
        raise RuntimeError(_explain(device, operator))
    if _load_error and not torch.compiler.is_compiling():
        _warn_once()
    return False


def _explain(device: torch.device, operator: str | None) -> str:
    what = f"{operator} on {device.type}" if operator else device.type
    if _load_error:
        return (
            f"backend 'native' was asked for {what}, but {_load_error}. Install a C++ compiler "
            f"(g++) and run `{REINSTALL}` in mann_ext's source folder, or use backend 'auto'"
        )
    if device.type == "cuda":
        fix = "build with nvcc (MANN_EXT_CUDA=1) or move the tensors to the CPU"
    else:
        fix = "move the tensors to the CPU"
    return f"backend 'native': there is no native kernel for {what}; {fix}, or use backend 'auto'"


def _warn_once() -> None:
    global _warned
    if _warned:
        return
    _warned = True
    warnings.warn(
        f"{_load_error[0].upper()}{_load_error[1:]}. It runs on the slower PyTorch reference. "
        f"For the fast path install a C++ compiler (g++) and run `{REINSTALL}` in mann_ext's "
        "source folder; MANN_EXT_BACKEND=reference hides this warning.",
        RuntimeWarning,
        stacklevel=4,
    )


class backend:
    """Context manager that chooses how the operators run, process-wide.

    Args:
        name: "auto" (native kernels where there are any, else the reference), "native" (native
            kernels or an error) or "reference" (plain PyTorch, the definition of what is right).

    Raises:
        ValueError: the name is none of these.

    The environment variable ``MANN_EXT_BACKEND`` sets what holds outside any such context.

        >>> from mann_ext._library import backend, current_backend
        >>> with backend("reference"):
        ...     print(current_backend())
        reference
    """

    def __init__(self, name: BackendName) -> None:
        self.name: BackendName = _checked(name, "backend")
        self.previous: list[BackendName] = []

    def __enter__(self) -> backend:
        global _backend
        self.previous.append(_backend)  # a list, so that one object may be entered again inside
        _backend = self.name
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        global _backend
        _backend = self.previous.pop()
