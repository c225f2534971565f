"""Builds the CUDA operators for the CPU (cuda_on_cpu.h) and lets them stand in for the others.

The library registers all operators as ``torch.ops.mann_ext_cuda_on_cpu.*``, for CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

from mann_ext import _library
from tests.test_build import build as setup_py

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
BUILD = ROOT / "build" / "cuda_on_cpu"
NAMESPACE = "mann_ext_cuda_on_cpu"

needs_compiler = pytest.mark.skipif(
    setup_py.find_compiler() is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler on Linux",
)

FLAGS = (
    "-std=c++20 -O2 -g1 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno "
    "-Wall -Wno-unknown-pragmas -Wno-attributes -Wno-unused-function"
).split()


def compile_library(
    sources: list[Path], build: Path = BUILD, name: str = f"lib{NAMESPACE}.so"
) -> Path:
    """Compile .cu files with the host's compiler, what changed of them, into one library."""
    compiler = setup_py.find_compiler()
    assert compiler is not None
    torch_folder = setup_py.torch_folder()
    ninja = setup_py.NinjaFile(build)
    ninja.rule(
        "cxx",
        [*compiler, "-MD", "-MF", "$out.d", *FLAGS, "$flags", "-c", "$in", "-o", "$out"],
        deps=True,
    )
    ninja.rule("link", [*compiler, "-shared", "-o", "$out", "$in", "$flags"])
    # The macro renames the operators' namespace, in C++ and in torch.
    includes = [f"-I{ROOT / 'csrc'}", "-isystem", str(torch_folder / "include")]
    flags = [*includes, setup_py.STABLE_ABI, f"-Dmann_ext={NAMESPACE}"]
    cuda = ["-include", str(HERE / "cuda_on_cpu.h"), "-x", "c++"]
    objects = [ninja.add("cxx", build / "cuda_on_cpu.o", [HERE / "cuda_on_cpu.cpp"])]
    for source in [ROOT / "csrc/blocks.cpp", *sources]:  # which new_tensor calls
        extra = cuda if source.suffix == ".cu" else []
        objects.append(ninja.add("cxx", build / f"{source.name}.o", [source], [*flags, *extra]))
    link = [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    library: Path = ninja.add("link", build / name, objects, link)
    ninja.run()
    return library


@functools.cache
def load() -> ctypes.CDLL:
    """Compile and load all operators of csrc/cuda; returns the library's settings."""
    sources = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cuda").glob("*.cu"))]
    path = compile_library(sources)
    torch.ops.load_library(str(path))
    for name in operators():
        fake = torch._library.simple_registry.singleton.find(f"mann_ext::{name}").fake_impl.kernel
        if fake is not None:
            torch.library.register_fake(f"{NAMESPACE}::{name}")(fake.func)
    library = ctypes.CDLL(str(path))
    library.cuda_on_cpu_set_seed.argtypes = [ctypes.c_uint64]
    library.cuda_on_cpu_launches.restype = ctypes.c_int64
    return library


def operators() -> frozenset[str]:
    """Names of the operators that the emulated library has a kernel of."""
    registered = torch._C._dispatch_get_registrations_for_dispatch_key("CPU")
    names = [name.split("::", 1) for name in registered]
    return frozenset(name.split(".")[0] for space, name in names if space == NAMESPACE)


@contextmanager
def cuda_on_cpu(seed: int = 0, multiprocessors: int = 3) -> Iterator[ctypes.CDLL]:
    """Run the native operators on the emulated CUDA kernels; what has none is an error.

    Outputs are NaN before a kernel writes them.
    """
    library = load()
    library.cuda_on_cpu_set_seed(seed)
    library.cuda_on_cpu_set_multiprocessors(multiprocessors)
    emulated = getattr(torch.ops, NAMESPACE)
    before = torch.are_deterministic_algorithms_enabled()
    with (
        mock.patch.object(torch.ops, "mann_ext", emulated),
        mock.patch.dict(_library._kernels, {"cpu": operators()}),
        _library.backend("native"),
    ):
        torch.use_deterministic_algorithms(True)  # new tensors are filled with NaN
        try:
            yield library
        finally:
            torch.use_deterministic_algorithms(before)
