"""What a bug report needs: versions, how the operators were built, and what they use here."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from mann_ext import __version__, _library

PACKAGES = ("numpy", "safetensors", "tyro", "tensorboard", "torchmetrics", "pillow", "matplotlib")


def info() -> dict[str, str]:
    """Facts about this installation, as text by name, in the order to print them."""
    facts = {
        "mann_ext": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "torch": torch.__version__,
        "torch threads": str(torch.get_num_threads()),
        "torch CUDA": torch.version.cuda or "none",
        "GPUs": _gpu_names(),
        "backend": _library.current_backend(),
        "native operators": _library.load_error() or str(_library.LIBRARY_PATH),
    }
    for device_type in ("cpu", "cuda"):
        names = sorted(_library.native_operators(device_type))
        facts[f"{device_type} kernels"] = ", ".join(names) or "none"
    facts.update(_build_facts())
    facts["packages"] = ", ".join(filter(None, map(_package, PACKAGES)))
    settings = {name: value for name, value in os.environ.items() if name.startswith("MANN_EXT_")}
    facts["settings"] = ", ".join(f"{k}={v}" for k, v in sorted(settings.items())) or "none"
    return facts


def format_info() -> str:
    """The facts of `info`, one a line."""
    facts = info()
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name + ':':<{width}}{value}" for name, value in facts.items())


def _build_facts() -> dict[str, str]:
    try:
        from mann_ext import _C
    except ImportError as error:
        return {"build": f"no build information ({error})"}
    facts = {name.replace("_", " "): value or "none" for name, value in _C.build_info().items()}
    facts["built from version"] = facts.pop("version")
    try:
        facts["cpu instruction set"] = _C.cpu_instruction_set()
    except ValueError as error:  # MANN_EXT_CPU_ISA is misspelt
        facts["cpu instruction set"] = str(error)
    facts["usable cpus"] = str(_C.usable_cpus())
    return facts


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _gpu_names() -> str:
    if not torch.cuda.is_available():
        return "none"
    count = torch.cuda.device_count()
    return ", ".join(torch.cuda.get_device_name(index) for index in range(count))


def _package(name: str) -> str:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return ""


if __name__ == "__main__":
    print(format_info())
