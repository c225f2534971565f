"""The build: what it finds, what it says when something is missing, and what it produces."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from mann_ext import _library

ROOT = Path(__file__).resolve().parents[1]
NO_TOOLS = {"PATH": "/nonexistent"}


def load_setup() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mann_ext_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


build = load_setup()

needs_compiler = pytest.mark.skipif(
    build.find_compiler() is None or not sys.platform.startswith("linux"),
    reason="needs a C++ compiler on Linux",
)


# What is found, and what is said when it is not


def test_switches_are_0_1_or_auto():
    assert build.switch("MANN_EXT_CUDA", {}) == "auto"
    assert build.switch("MANN_EXT_CUDA", {"MANN_EXT_CUDA": "1"}) == "1"
    with pytest.raises(SystemExit, match="MANN_EXT_CUDA='yes': expected 0, 1 or auto"):
        build.switch("MANN_EXT_CUDA", {"MANN_EXT_CUDA": "yes"})


def test_without_a_compiler_the_package_is_built_without_operators(capsys):
    assert build.find_compiler(NO_TOOLS) is None
    assert build.native_wanted(NO_TOOLS) is False
    message = capsys.readouterr().err
    assert message.count("mann_ext build:") == 1
    assert "Install g++" in message or sys.platform in message


def test_a_missing_compiler_is_an_error_if_the_operators_were_asked_for():
    with pytest.raises(SystemExit, match="MANN_EXT_NATIVE=1 but"):
        build.native_wanted({**NO_TOOLS, "MANN_EXT_NATIVE": "1"})


def test_operators_can_be_left_out(capsys):
    assert build.native_wanted({**os.environ, "MANN_EXT_NATIVE": "0"}) is False
    assert capsys.readouterr().err == ""


def test_a_wrong_cxx_is_named():
    with pytest.raises(SystemExit, match="CXX='no-such-g\\+\\+ -m64'"):
        build.find_compiler({**NO_TOOLS, "CXX": "no-such-g++ -m64"})


def test_missing_nvcc_is_an_error_only_if_cuda_was_asked_for(monkeypatch):
    monkeypatch.setattr(build, "USUAL_NVCC", "/nonexistent/nvcc")
    assert build.find_nvcc(NO_TOOLS) is None
    with pytest.raises(SystemExit, match="nvcc was not found"):
        build.find_nvcc({**NO_TOOLS, "MANN_EXT_CUDA": "1"})


def test_cuda_can_be_switched_off(tmp_path):
    nvcc = tmp_path / "bin/nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\n")
    nvcc.chmod(0o755)
    environ = {**NO_TOOLS, "CUDA_HOME": str(tmp_path)}
    assert build.find_nvcc(environ) == str(nvcc)
    assert build.find_nvcc({**environ, "MANN_EXT_CUDA": "0"}) is None


@pytest.mark.parametrize("missing", ["torch", "ninja", "pybind11"])
def test_a_missing_build_tool_is_named_with_the_fix(monkeypatch, missing):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", NO_TOOLS["PATH"])
    finder = {
        "torch": build.torch_folder,
        "ninja": build.find_ninja,
        "pybind11": build.pybind11_include,
    }[missing]
    with pytest.raises(SystemExit, match=rf"{missing} (was|is) not .*install"):
        finder()


@pytest.mark.parametrize("text", ["8.0;9.0+PTX", "80 90+PTX", "sm_80, sm_90+ptx", "auto", ""])
def test_cuda_architectures_are_read_in_every_usual_spelling(text):
    archs = build.cuda_archs({"MANN_EXT_CUDA_ARCHS": text})
    assert archs == ["sm_80", "sm_90", "compute_90"]
    assert build.gencode(archs) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


def test_new_cuda_architectures_need_no_change_here():
    assert build.cuda_archs({"MANN_EXT_CUDA_ARCHS": "9.0a;12.0"}) == ["sm_90a", "sm_120"]


def test_an_unreadable_cuda_architecture_is_named():
    with pytest.raises(SystemExit, match="cannot read 'hopper'"):
        build.cuda_archs({"MANN_EXT_CUDA_ARCHS": "8.0;hopper"})


def test_only_x86_is_compiled_for_several_instruction_sets():
    assert list(build.simd_variants("x86_64")) == ["baseline", "avx2", "avx512"]
    assert build.simd_variants("x86_64")["baseline"] == []
    assert build.simd_variants("aarch64") == {"baseline": []}


# What is built: a project of three tiny sources


@pytest.fixture
def sources(tmp_path):
    csrc = tmp_path / "a folder/csrc"
    (csrc / "cpu").mkdir(parents=True)
    (csrc / "cpu/answer.h").write_text("#pragma once\n#define ANSWER 42\n")
    (csrc / "ops.cpp").write_text(
        'extern "C" __attribute__((visibility("default")))\nint one() { return 1; }\n'
    )
    (csrc / "cpu/answer.simd.cpp").write_text(
        '#include "cpu/answer.h"\n#define NAME_(isa) answer_##isa\n#define NAME(isa) NAME_(isa)\n'
        'extern "C" __attribute__((visibility("default")))\nint NAME(MANN_EXT_ISA)() '
        "{ return ANSWER; }\n"
    )
    return csrc


def build_tiny(csrc: Path) -> Path:
    ninja = build.NinjaFile(csrc.parent / "build")
    library = ninja.build / "libtiny.so"
    assert build.write_build(ninja, library, ninja.build / "_C.so", "0", csrc) == [library]
    ninja.run()
    return library


@needs_compiler
def test_simd_sources_are_in_the_library_once_for_each_instruction_set(sources):
    library = ctypes.CDLL(str(build_tiny(sources)))
    for isa in build.simd_variants():
        assert getattr(library, f"answer_{isa}")() == 42


@needs_compiler
def test_a_changed_header_rebuilds_what_includes_it_and_nothing_else(sources):
    library = build_tiny(sources)
    objects = sorted(library.parent.rglob("*.o"))
    before = {path: path.stat().st_mtime_ns for path in objects}
    build_tiny(sources)
    assert {path: path.stat().st_mtime_ns for path in objects} == before

    (sources / "cpu/answer.h").write_text("#pragma once\n#define ANSWER 43\n")
    assert (
        ctypes.CDLL(str(shutil.copy(build_tiny(sources), sources / "new.so"))).answer_baseline()
        == 43
    )
    rebuilt = {path.name for path in objects if path.stat().st_mtime_ns != before[path]}
    assert rebuilt == {f"answer.simd.cpp.{isa}.o" for isa in build.simd_variants()}


@needs_compiler
def test_a_compile_error_stops_the_build(sources):
    (sources / "ops.cpp").write_text("not C++\n")
    with pytest.raises(SystemExit, match="compilation failed"):
        build_tiny(sources)


def run_setup(folder: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for name in ("LICENSE", "README.md"):
        (folder / name).write_text("")
    (folder / "mann_ext").mkdir()
    (folder / "mann_ext/__init__.py").write_text('__version__ = "1.2.3"\n')
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, "MANN_EXT_NATIVE": "auto", **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


@needs_compiler
def test_the_wheel_contains_the_library_and_names_its_platform(sources):
    result = run_setup(sources.parent, "bdist_wheel")
    assert result.returncode == 0, result.stderr
    (wheel,) = (sources.parent / "dist").glob("*.whl")
    assert "none-any" not in wheel.name
    assert "mann_ext/libmann_ext.so" in zipfile.ZipFile(wheel).namelist()


def test_the_wheel_of_a_machine_without_compiler_is_pure_python(sources):
    result = run_setup(sources.parent, "bdist_wheel", CXX="", PATH=NO_TOOLS["PATH"])
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("without the compiled operators") == 1
    (wheel,) = (sources.parent / "dist").glob("*.whl")
    assert wheel.name == "mann_ext-1.2.3-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


# What is installed


@pytest.mark.skipif(not _library.native_available(), reason="the operators are not built")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_the_library_needs_neither_python_nor_the_cuda_runtime():
    dynamic = subprocess.run(
        ["readelf", "-d", _library.LIBRARY_PATH], capture_output=True, text=True, check=True
    ).stdout
    needed = [line for line in dynamic.splitlines() if "NEEDED" in line]
    assert any("libtorch_cpu.so" in line for line in needed)
    assert not [line for line in needed if "python" in line or "cuda" in line]
    assert "RPATH" not in dynamic  # the torch that is imported is used, not the one built against
    assert "RUNPATH" not in dynamic


def cpu_instruction_set(cap: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from mann_ext import _C; print(_C.cpu_instruction_set())"],
        env={**os.environ, "MANN_EXT_CPU_ISA": cap},
        capture_output=True,
        text=True,
    )


def test_the_instruction_set_can_be_capped_by_the_environment():
    pytest.importorskip("mann_ext._C")
    assert cpu_instruction_set("baseline").stdout.strip() == "baseline"
    assert cpu_instruction_set("avx2").stdout.strip() in ("baseline", "avx2")
    misspelt = cpu_instruction_set("sse9")
    assert misspelt.returncode != 0
    assert "MANN_EXT_CPU_ISA=sse9: expected baseline, avx2 or avx512" in misspelt.stderr


def test_build_information_is_complete():
    bindings = pytest.importorskip("mann_ext._C")
    info = bindings.build_info()
    assert {"version", "compiler", "built_with_torch", "cuda_architectures"} <= set(info)
    assert bindings.usable_cpus() >= 1
