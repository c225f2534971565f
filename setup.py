"""Builds ``mann_ext/libmann_ext.so`` (the operators) and ``mann_ext._C`` (build information).

The operators use PyTorch's stable C++ interface, so one library serves every torch from 2.10 on,
with or without CUDA. g++ compiles the C++ sources, nvcc (where there is one) the CUDA sources;
ninja runs them in parallel and rebuilds only what changed. Environment variables:

    MANN_EXT_NATIVE      0 | 1 | auto   build the operators: no, yes, if there is a C++ compiler
    MANN_EXT_CUDA        0 | 1 | auto   compile csrc/cuda: no, yes, if there is an nvcc and the
                                        installed torch can use a GPU
    MANN_EXT_CUDA_ARCHS  e.g. "8.0;9.0+PTX" (the default); sm_80 and 80 mean the same as 8.0
    CXX, NVCC, CUDA_HOME, MAX_JOBS   the usual meaning
"""

from __future__ import annotations

import fcntl
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "native"

CXX_FLAGS = (
    "-std=c++20 -O3 -g1 -fPIC -fvisibility=hidden -ffp-contract=fast -fno-math-errno "
    "-Wall -Wextra -Wno-unknown-pragmas"
).split()
NVCC_FLAGS = (
    "-std=c++20 -O3 -lineinfo --expt-relaxed-constexpr --expt-extended-lambda "
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-math-errno"
).split()
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"  # torch 2.10
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
USUAL_NVCC = "/usr/local/cuda/bin/nvcc"  # often there without being on the PATH

# Every csrc/cpu/NAME.simd.cpp is compiled for each of these; csrc/cpu/isa.h chooses at run time.
ISA_FLAGS_X86 = {
    "baseline": [],
    "avx2": "-mavx2 -mfma -mf16c".split(),
    "avx512": (
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma -mf16c "
        "-mprefer-vector-width=512 -mtune=icelake-server"
    ).split(),
}


class BuildError(SystemExit):
    """A build problem with one message for the person who runs the build."""

    def __init__(self, message: str) -> None:
        super().__init__(f"mann_ext build: {message}")


def switch(name: str, environ: Mapping[str, str] = os.environ) -> str:
    """Value of an on/off/auto environment variable: ``"0"``, ``"1"`` or ``"auto"``."""
    value = environ.get(name, "auto").strip().lower() or "auto"
    if value not in ("0", "1", "auto"):
        raise BuildError(f"{name}={value!r}: expected 0, 1 or auto")
    return value


def find_compiler(environ: Mapping[str, str] = os.environ) -> list[str] | None:
    """The C++ compiler as a command (CXX, else g++, c++ or clang++), or None if there is none."""
    asked = environ.get("CXX", "").strip()
    if asked:
        command = shlex.split(asked)
        if shutil.which(command[0], path=environ.get("PATH")) is None:
            raise BuildError(f"CXX={asked!r} is not an executable; correct or unset CXX")
        return command
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name, path=environ.get("PATH")):
            return [name]
    return None


def find_nvcc(environ: Mapping[str, str] = os.environ) -> str | None:
    """Path of nvcc as MANN_EXT_CUDA, NVCC, CUDA_HOME and PATH say; None: CUDA is not built."""
    wanted = switch("MANN_EXT_CUDA", environ)
    if wanted == "0":
        return None
    home = environ.get("CUDA_HOME") or environ.get("CUDA_PATH")
    candidates = [environ.get("NVCC"), f"{home}/bin/nvcc" if home else None, "nvcc", USUAL_NVCC]
    for candidate in candidates:
        found = candidate and shutil.which(candidate, path=environ.get("PATH"))
        if found:
            return found
    if wanted == "1":
        raise BuildError(
            "MANN_EXT_CUDA=1 but nvcc was not found; install the CUDA toolkit, set CUDA_HOME or "
            "NVCC, or set MANN_EXT_CUDA=0 for a CPU-only build"
        )
    return None


def cuda_wanted(torch: Path, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to look for nvcc: for a torch without CUDA only if that was asked for."""
    return switch("MANN_EXT_CUDA", environ) == "1" or (torch / "lib/libtorch_cuda.so").is_file()


def cuda_libraries(nvcc: str) -> Path:
    """Folder of libcudart_static.a in the toolkit that `nvcc` belongs to."""
    # nvcc may be a wrapper script somewhere on the PATH: only a dry run says where its toolkit is.
    dry = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull],
        capture_output=True,
        text=True,
    )
    tops = re.findall(r"^#\$ TOP=(.*)$", dry.stderr, flags=re.MULTILINE)
    for top in [*map(Path, tops), Path(nvcc).resolve().parent.parent]:
        for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"):
            if (top / folder / "libcudart_static.a").is_file():
                return (top / folder).resolve()
    raise BuildError(
        f"nvcc is {nvcc}, but libcudart_static.a was not found beside it; install the CUDA "
        "runtime's development files or set MANN_EXT_CUDA=0"
    )


def cuda_archs(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Architectures as nvcc names them: sm_80 for machine code, compute_90 for PTX."""
    text = environ.get("MANN_EXT_CUDA_ARCHS", "").strip()
    if text.lower() in ("", "auto"):
        text = DEFAULT_CUDA_ARCHS
    archs: list[str] = []
    for item in re.split(r"[;,\s]+", text):
        match = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d[af]?)(\+PTX)?", item, re.IGNORECASE)
        if match is None:
            raise BuildError(
                f"MANN_EXT_CUDA_ARCHS={text!r}: cannot read {item!r}; "
                "expected a list such as 8.0;9.0+PTX"
            )
        number = match[1] + match[2].lower()
        archs.append(f"sm_{number}")
        if match[3]:
            archs.append(f"compute_{number}")
    return list(dict.fromkeys(archs))


def gencode(archs: list[str]) -> list[str]:
    """nvcc flags for the architectures of `cuda_archs`."""
    return [f"-gencode=arch=compute_{arch.split('_')[1]},code={arch}" for arch in archs]


def simd_variants(machine: str = platform.machine()) -> dict[str, list[str]]:
    """Instruction sets and their compiler flags for each *.simd.cpp on this kind of machine."""
    return ISA_FLAGS_X86 if machine.lower() in ("x86_64", "amd64") else {"baseline": []}


def torch_folder() -> Path:
    """Folder of the installed torch, whose headers and libraries the build uses."""
    spec = find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError(
            "torch is not installed where this build runs; install torch first, then "
            "`pip install --no-build-isolation .` so that the build can see it"
        )
    folder = Path(next(iter(spec.submodule_search_locations)))
    if not (folder / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(
            f"the torch in {folder} has no stable C++ interface; torch>=2.10 is needed"
        )
    return folder


def torch_version() -> str:
    """Version of the installed torch, without importing it."""
    from importlib.metadata import version

    return version("torch")


def find_ninja() -> str:
    """Path of the ninja executable (from the PyPI package or the PATH)."""
    if find_spec("ninja"):
        import ninja

        candidate = Path(ninja.BIN_DIR) / "ninja"
        if candidate.is_file():
            return str(candidate)
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja was not found; `pip install ninja`")
    return found


def pybind11_include() -> str:
    """Include folder of pybind11."""
    if find_spec("pybind11") is None:
        raise BuildError("pybind11 was not found; `pip install pybind11`")
    import pybind11

    return str(pybind11.get_include())


def native_wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to build the operators; False with one message where no C++ compiler is found."""
    wanted = switch("MANN_EXT_NATIVE", environ)
    if wanted == "0":
        return False
    if find_compiler(environ) is not None and sys.platform.startswith("linux"):
        return True
    reason = (
        "no C++ compiler was found (looked for CXX, g++, c++, clang++)"
        if sys.platform.startswith("linux")
        else f"the operators are built on Linux only, and this is {sys.platform}"
    )
    if wanted == "1":
        raise BuildError(f"MANN_EXT_NATIVE=1 but {reason}")
    print(
        f"mann_ext build: {reason}: installing without the compiled operators; everything runs on "
        "the slower PyTorch reference. Install g++ and reinstall for the fast path.",
        file=sys.stderr,
    )
    return False


@dataclass
class NinjaFile:
    """The text of a build.ninja: rules for C++, CUDA and linking, and one statement per output."""

    build: Path
    lines: list[str] = field(default_factory=list)

    def rule(self, name: str, command: list[str], *, deps: bool = False, log: bool = False) -> None:
        """Add a rule; `$in`, `$out` and `$flags` in the command are ninja's. `log`: to $out.log."""
        text = " ".join(part if part.startswith("$") else quote(part) for part in command)
        if log:
            text += " > $out.log 2>&1 || { cat $out.log; exit 1; }"
        self.lines += [f"rule {name}", f"  command = {text}", f"  description = {name} $out"]
        if deps:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def add(
        self, rule: str, output: Path, inputs: list[Path], flags: list[str] | None = None
    ) -> Path:
        """Add a build statement and return its output."""
        names = " ".join(escape(path) for path in inputs)
        self.lines.append(f"build {escape(output)}: {rule} {names}")
        if flags:
            self.lines.append("  flags = " + " ".join(map(quote, flags)))
        return output

    def run(self) -> None:
        """Write build.ninja and build everything in it."""
        self.build.mkdir(parents=True, exist_ok=True)
        jobs = os.environ.get("MAX_JOBS")
        with (self.build / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # two builds of one checkout must not mix
            (self.build / "build.ninja").write_text("\n".join(self.lines) + "\n")
            command = [find_ninja(), "-C", str(self.build), *(["-j", jobs] if jobs else [])]
            print(" ".join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                raise BuildError("compilation failed; the compiler's own messages are above")


def quote(text: str) -> str:
    """Quote for the shell, then for ninja."""
    return shlex.quote(text).replace("$", "$$")


def escape(path: Path) -> str:
    """A path as ninja writes it."""
    return re.sub(r"([ :$])", r"$\1", str(path))


def write_build(
    ninja: NinjaFile, library: Path, bindings: Path, version: str, csrc: Path = CSRC
) -> list[Path]:
    """Fill `ninja` with what makes `library` and `bindings`; returns those that have sources."""
    outputs: list[Path] = []
    compiler = find_compiler()
    assert compiler is not None
    torch = torch_folder()
    includes = [f"-I{csrc}", "-isystem", str(torch / "include")]
    cuda_sources = sorted(csrc.glob("cuda/*.cu"))
    nvcc = find_nvcc() if cuda_sources and cuda_wanted(torch) else None
    archs = cuda_archs() if nvcc else []

    ninja.rule(
        "cxx",
        [*compiler, "-MD", "-MF", "$out.d", *CXX_FLAGS, "$flags", "-c", "$in", "-o", "$out"],
        deps=True,
    )
    ninja.rule("link", [*compiler, "-shared", "-o", "$out", "$in", "$flags"])

    flags = [*includes, STABLE_ABI]
    plain = [path for path in sorted(csrc.glob("*.cpp")) if path.name != "bindings.cpp"]
    plain += [p for p in sorted(csrc.glob("cpu/*.cpp")) if not p.name.endswith(".simd.cpp")]
    objects = [
        ninja.add("cxx", ninja.build / f"{path.relative_to(csrc)}.o", [path], flags)
        for path in plain
    ]
    # Inline functions shared by several objects are taken from the first that has them, so objects
    # for newer instruction sets come last: else an old CPU could meet an AVX-512 std::vector.
    for isa, isa_flags in simd_variants().items():
        for path in sorted(csrc.glob("cpu/*.simd.cpp")):
            output = ninja.build / f"{path.relative_to(csrc)}.{isa}.o"
            objects.append(
                ninja.add("cxx", output, [path], [*flags, *isa_flags, f"-DMANN_EXT_ISA={isa}"])
            )
    # libtorch.so is kept even if nothing of it is used: through it the CUDA half of a torch that
    # has one is found (symbols that are weak here), whichever torch the library was built with.
    link = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"]
    link += ["-ltorch_cpu", "-lc10", "-Wl,--exclude-libs,ALL"]
    if nvcc:
        host = next(word for word in reversed(compiler) if not word.startswith("-"))
        # What each kernel uses (registers, stack, spills) goes to the log, which the tests read.
        ninja.rule(
            "nvcc",
            [nvcc, f"-ccbin={host}", "-MD", "-MF", "$out.d", *NVCC_FLAGS, "-Xptxas=-v"]
            + [*gencode(archs), "$flags", "-c", "$in", "-o", "$out"],
            deps=True,
            log=True,
        )
        objects += [
            ninja.add("nvcc", ninja.build / f"{path.relative_to(csrc)}.o", [path], flags)
            for path in cuda_sources
        ]
        link += [f"-L{cuda_libraries(nvcc)}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    if objects:
        outputs.append(ninja.add("link", library, objects, link))

    if (csrc / "bindings.cpp").is_file():
        import sysconfig

        info = {
            "VERSION": version,
            "CUDA_ARCHS": " ".join(archs),
            "NVCC": nvcc_version(nvcc) if nvcc else "",
            "TORCH": torch_version(),
            "CXX_FLAGS": " ".join(CXX_FLAGS),
            "ISAS": " ".join(simd_variants()),
        }
        defines = [f'-DMANN_EXT_BUILD_{name}="{value}"' for name, value in info.items()]
        python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11_include()]
        output = ninja.add(
            "cxx",
            ninja.build / "bindings.cpp.o",
            [csrc / "bindings.cpp"],
            [f"-I{csrc}", *python, *defines],
        )
        outputs.append(ninja.add("link", bindings, [output], ["-Wl,--as-needed"]))
    return outputs


def nvcc_version(nvcc: str) -> str:
    """The release of the CUDA toolkit, such as "13.0"."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match[1] if match else "unknown"


class NinjaBuild(build_ext):
    """Builds with ninja in build/native, then copies the results to where setuptools wants them."""

    def get_ext_filename(self, ext_name: str) -> str:
        if ext_name.endswith("libmann_ext"):  # loaded by torch, not imported: no Python tag
            return str(Path(*ext_name.split("."))) + ".so"
        return str(super().get_ext_filename(ext_name))

    def run(self) -> None:
        targets = {
            extension.name: BUILD / Path(self.get_ext_filename(extension.name)).name
            for extension in self.extensions
        }
        ninja = NinjaFile(BUILD)
        outputs = write_build(
            ninja,
            targets["mann_ext.libmann_ext"],
            targets["mann_ext._C"],
            self.distribution.get_version(),
        )
        if outputs:
            ninja.run()
        for extension in self.extensions:
            built = targets[extension.name]
            if built in outputs:
                place(built, Path(self.build_lib) / self.get_ext_filename(extension.name))
        if self.inplace:
            self.copy_extensions_to_source()


def place(source: Path, target: Path) -> None:
    """Copy by rename, so that a process that has the old library mapped keeps it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".new")
    shutil.copy2(source, temporary)
    temporary.replace(target)


def main() -> None:
    """Run setuptools with the native parts, or without them where they cannot be built."""
    names = ["mann_ext.libmann_ext", "mann_ext._C"] if native_wanted() else []
    setup(
        ext_modules=[Extension(name, sources=[], optional=True) for name in names],
        cmdclass={"build_ext": NinjaBuild} if names else {},
    )


if __name__ == "__main__":
    main()
