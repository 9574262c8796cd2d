"""Builds the extension `tdpo_ext._C` with CMake (CMakeLists.txt), with the headers of the torch that is installed.

Environment:
    TDPO_BRGEMM      1 (default) or 0: the optional module _brgemm, which loads only in the installed torch release
    TDPO_CUDA        auto (default: CUDA kernels if torch is a CUDA build and a GPU is visible, for its architecture),
                     0, or 1 (needs neither; for the architectures of csrc/cuda/cuda.cmake)
    TDPO_CUDA_ARCHS  CUDA architectures, such as "90" or "80;90"; with auto, a CUDA build of torch is then enough
    CUDA_HOME        the CUDA toolkit (default: the nvcc on the PATH, or NVIDIA's packages, which an isolated build has)
    TDPO_LOCAL_VERSION  local part of the package's version, such as cu13 for a wheel with kernels for CUDA 13
    CMAKE_ARGS       additional arguments for CMake
"""

import atexit
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "tools"))

import build_backend  # noqa: E402
import build_cuda  # noqa: E402

# Processor time of a first build, measured: the C++ files, one CUDA architecture, and each further one.
CPP_SECONDS, CUDA_SECONDS, NEXT_CUDA_SECONDS = 42, 46, 39


def program(name: str) -> str:
    """Path of a build program, from its Python package or else from the PATH.

    The package comes first: the script that it puts on the PATH doesn't run in an isolated build.
    """
    if find_spec(name) is not None:
        module = __import__(name)
        bundled = Path(getattr(module, f"{name.upper()}_BIN_DIR", None) or module.BIN_DIR) / name
        if bundled.exists():
            return str(bundled)
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"tdpo_ext: {name} is needed to build; run `pip install {name}`")
    return found


def local_version() -> str:
    """What follows the version of pyproject.toml: "+" and the local part, or nothing."""
    local = os.environ.get("TDPO_LOCAL_VERSION")
    return f"+{local}" if local else ""


def brgemm_argument() -> str:
    """The CMake argument for the optional module."""
    requested = os.environ.get("TDPO_BRGEMM", "1")
    if requested not in ("0", "1"):
        raise SystemExit(f"tdpo_ext: TDPO_BRGEMM is {requested!r}; allowed are 0 and 1")
    return f"-DTDPO_BRGEMM={'ON' if requested == '1' else 'OFF'}"


def oldest_torch(requirements: list[str]) -> str:
    """X.Y of the requirement torch>=X.Y (pyproject.toml): the operators load in this release and in later ones."""
    return next(entry.removeprefix("torch>=") for entry in requirements if entry.startswith("torch>="))


def check_compiler() -> None:
    """Raises SystemExit where there is no C++ compiler; which one is used is CMake's choice."""
    named = os.environ.get("CXX") or "CMAKE_CXX_COMPILER" in os.environ.get("CMAKE_ARGS", "")
    if not named and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise SystemExit(
            "tdpo_ext: there is no C++ compiler; run `apt-get install g++` (Debian, Ubuntu) or `dnf install gcc-c++` "
            "(Fedora), or name one in CXX"
        )


def expected_time(cuda: build_cuda.Choice) -> str:
    """About how long a first build takes: one process compiles all CUDA architectures, others the C++ files."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    architectures = cuda.archs.count(";") + 1 if cuda.archs else 3
    cuda_seconds = CUDA_SECONDS + NEXT_CUDA_SECONDS * (architectures - 1) if cuda.compiler else 0
    seconds = max((CPP_SECONDS + cuda_seconds) / cores, cuda_seconds)
    return f"about {max(1, round(seconds / 30)) / 2:g} min on {cores} cores the first time"


def what_failed(output: str) -> str:
    """The first error in the output of CMake or of a compiler."""
    if configuring := re.search(r"^CMake Error[^\n]*\n((?:\n|  .*\n)+)", output, re.MULTILINE):
        return textwrap.shorten(configuring.group(1), 120, placeholder=" ...")
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    return next(
        (line for line in lines if re.search(r"\berror\b|\bfatal\b", line)), lines[-1] if lines else "no output"
    )


def run(command: list[str], log: Path) -> None:
    """Runs a command, with its output in a file.

    Raises:
        SystemExit: it failed; the message has its first error and names the file.
    """
    with log.open("a") as file:
        print(f"$ {shlex.join(command)}", file=file, flush=True)
        begin = file.tell()
        failed = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode != 0
    if failed:
        atexit.unregister(shutil.rmtree)  # the log may lie in a temporary folder
        error = what_failed(log.read_bytes()[begin:].decode(errors="replace"))
        hint = "; with little memory, set CMAKE_BUILD_PARALLEL_LEVEL=1" if "Killed" in error else ""
        raise SystemExit(f"tdpo_ext: the build failed: {error}{hint} (all output: {log})")


def build_base() -> Path:
    """Where the build's files go: `build`, or a temporary folder where the source tree is read-only."""
    if os.access(ROOT, os.W_OK):
        return ROOT / "build"
    temporary = tempfile.mkdtemp(prefix="tdpo_ext-build-")
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary)


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11

        check_compiler()
        torch_root, torch_version, torch_cuda = build_backend.installed_torch()
        include = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]
        cuda = build_cuda.choose(torch_cuda)
        if self.editable_mode and not os.access(ROOT, os.W_OK):
            raise SystemExit(f"tdpo_ext: an editable build writes into {ROOT}, which is read-only; run `pip install .`")
        if cuda.requirement:
            raise SystemExit(
                f"tdpo_ext: CUDA kernels need nvcc: run `pip install '{cuda.requirement}'`, or set TDPO_CUDA=0 for a "
                "build without them"
            )
        print(
            f"tdpo_ext: building for torch {torch_version}, {cuda}; {expected_time(cuda)}",
            file=sys.stderr,
            flush=True,
        )
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        target = f"{sys.implementation.cache_tag}-{get_platform()}-torch-{torch_version}{cuda.folder}"
        build = Path(self.get_finalized_command("build").build_base).resolve() / target
        build.mkdir(parents=True, exist_ok=True)
        cmake = program("cmake")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={program('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            "-DPYBIND11_FINDPYTHON=ON",
            f"-DTDPO_VERSION={self.distribution.get_version().split('+')[0]}{local_version()}",
            f"-DTDPO_TORCH_VERSION={torch_version}",
            f"-DTDPO_TORCH_INCLUDE={';'.join(map(str, include))}",
            f"-DTDPO_TORCH_LIB={torch_root / 'lib'}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DTDPO_OLDEST_TORCH={oldest_torch(self.distribution.install_requires)}",
            brgemm_argument(),
            *build_cuda.cmake_arguments(cuda, build / "cuda"),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        (destination / "_brgemm.so").unlink(missing_ok=True)  # left by an earlier build
        log = build / "log.txt"
        log.unlink(missing_ok=True)
        for command in (configure, [cmake, "--build", str(build)], [cmake, "--install", str(build)]):
            run(command, log)
        if self.editable_mode:  # setuptools copies only the module itself into the source tree
            for built in ("_built_with.py", "_brgemm.so"):
                if (destination / built).exists():
                    shutil.copy(destination / built, ROOT / "tdpo_ext")


if __name__ == "__main__":
    base = build_base()
    elsewhere = {} if base == ROOT / "build" else {"egg_base": str(base)}
    setup(
        ext_modules=[Extension("tdpo_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        options={"egg_info": {"tag_build": local_version(), **elsewhere}, "build": {"build_base": str(base)}},
    )
