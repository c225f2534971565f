"""Choosing between native operators and the reference, with and without the compiled library."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mann_ext import _library
from mann_ext.info import format_info, info

PACKAGE = Path(_library.__file__).parent
CPU = torch.device("cpu")


def test_backend_holds_inside_its_context_only():
    outside = _library.current_backend()
    with _library.backend("reference"):
        assert _library.current_backend() == "reference"
        with _library.backend("auto"):
            assert _library.current_backend() == "auto"
        assert _library.current_backend() == "reference"
    assert _library.current_backend() == outside


def test_backend_is_restored_after_an_error():
    outside = _library.current_backend()
    with pytest.raises(KeyError), _library.backend("reference"):
        raise KeyError
    assert _library.current_backend() == outside


def test_one_backend_object_may_be_entered_twice():
    outside = _library.current_backend()
    reference = _library.backend("reference")
    with reference, reference:
        pass
    assert _library.current_backend() == outside


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="auto, native, reference, got 'fast'"):
        _library.backend("fast")


def test_reference_never_uses_native_kernels():
    with _library.backend("reference"):
        assert _library.use_native(CPU) is False


@pytest.mark.skipif(not _library.native_available(), reason="the operators are not built")
def test_native_kernels_are_used_on_the_cpu_by_default():
    with _library.backend("auto"):
        assert _library.use_native(CPU) is True
        assert _library.use_native(CPU, "no_such_operator") is False
        assert _library.use_native(torch.device("xpu")) is False
    with _library.backend("native"):
        assert _library.use_native(CPU) is True
        with pytest.raises(RuntimeError, match="no native kernel for no_such_operator on cpu"):
            _library.use_native(CPU, "no_such_operator")
        with pytest.raises(RuntimeError, match="no native kernel for xpu; move the tensors"):
            _library.use_native(torch.device("xpu"))


def test_torch_compile_traces_the_choice_and_follows_it(monkeypatch):
    monkeypatch.setattr(_library, "_load_error", "")
    monkeypatch.setattr(_library, "_kernels", {"cpu": frozenset({"some_operator"})})

    def operator(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if _library.use_native(x.device) else x * 3

    @torch.compile(fullgraph=True, backend="eager")
    def both(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with _library.backend("reference"):
            reference = operator(x)
        return operator(x), reference

    x = torch.ones(3)
    with _library.backend("auto"):
        native, reference = both(x)
        assert native[0] == 2
        assert reference[0] == 3
    with _library.backend("reference"):
        assert both(x)[0][0] == 3


def test_info_says_what_a_bug_report_needs():
    facts = info()
    assert facts["torch"] == torch.__version__
    assert {"mann_ext", "python", "cpu", "native operators", "cpu kernels"} <= set(facts)
    assert len(format_info().splitlines()) == len(facts)


# A copy of the package in which the library is missing or damaged, in a process of its own


@pytest.fixture
def without_library(tmp_path):
    shutil.copytree(
        PACKAGE, tmp_path / "mann_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def run_python(folder: Path, code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    settings = {k: v for k, v in os.environ.items() if not k.startswith("MANN_EXT_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env={**settings, "PYTHONPATH": str(folder), **environ},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_the_library_there_is_one_warning_that_says_what_to_do(without_library):
    code = """
import warnings
import torch
from mann_ext import _library
from mann_ext.info import info

cpu = torch.device("cpu")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    answers = [_library.use_native(cpu, "lrua_scan") for _ in range(3)]
assert answers == [False] * 3 and not _library.native_available()
(warning,) = caught
assert "g++" in str(warning.message) and "pip install" in str(warning.message)
assert "without its compiled operators" in info()["native operators"]
with _library.backend("native"):
    try:
        _library.use_native(cpu, "lrua_scan")
    except RuntimeError as error:
        assert "lrua_scan" in str(error) and "g++" in str(error)
    else:
        raise AssertionError("no error")
"""
    result = run_python(without_library, code)
    assert result.returncode == 0, result.stderr


def test_without_the_library_operators_give_the_references_results(without_library):
    pytest.importorskip("mann_ext.ops")
    code = """
import torch, warnings
from mann_ext import _library, ops

memory, usage = torch.rand(2, 5, 3, requires_grad=True), torch.rand(2, 5)
weights, keys = torch.eye(5)[:2].expand(2, 2, 5), torch.rand(4, 2, 2, 3)
gates = torch.rand(4, 2, 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = ops.lrua_scan(memory, weights, usage, keys, gates)
assert len([w for w in caught if w.category is RuntimeWarning]) == 1, caught
out.reads.sum().backward()
assert memory.grad.abs().sum() > 0
with _library.backend("reference"):
    expected = ops.lrua_scan(memory, weights, usage, keys, gates)
assert all(torch.equal(a, b) for a, b in zip(out, expected))
"""
    result = run_python(without_library, code)
    assert result.returncode == 0, result.stderr


def test_a_damaged_library_is_reported_and_the_reference_is_used(without_library):
    (without_library / "mann_ext/libmann_ext.so").write_bytes(b"\x7fELF damaged")
    code = """
import torch
from mann_ext import _library
assert not _library.native_available()
assert "do not load" in _library.load_error(), _library.load_error()
assert _library.use_native(torch.device("cpu")) is False
"""
    result = run_python(without_library, code)
    assert result.returncode == 0, result.stderr
    assert "do not load" in result.stderr


def test_the_environment_sets_the_backend(without_library):
    code = "from mann_ext import _library; print(_library.current_backend())"
    chosen = run_python(without_library, code, MANN_EXT_BACKEND="reference")
    assert chosen.stdout.strip() == "reference", chosen.stderr
    misspelt = run_python(without_library, code, MANN_EXT_BACKEND="fast")
    assert "MANN_EXT_BACKEND: expected one of auto, native, reference" in misspelt.stderr
