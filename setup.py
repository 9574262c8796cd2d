"""Builds the extension `tdpo_ext._C` with CMake (CMakeLists.txt), with the headers of the torch that is installed.

Environment:
    TDPO_BRGEMM      1 (default) or 0: the optional module _brgemm, which loads only in the installed torch release
    TDPO_CUDA        auto (default: CUDA kernels if torch is a CUDA build and nvcc is found), 0, or 1 (nvcc is enough)
    TDPO_CUDA_ARCHS  CUDA architectures, such as "90" or "80;90" (default: csrc/cuda/cuda.cmake)
    CUDA_HOME        the CUDA toolkit (default: the one whose nvcc is on the PATH)
    TDPO_LOCAL_VERSION  local part of the package's version, such as cu13 for a wheel with kernels for CUDA 13
    CMAKE_ARGS       additional arguments for CMake
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


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


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = Path(home, "bin", "nvcc")
        return str(nvcc) if nvcc.exists() else None
    return shutil.which("nvcc")


def cuda_release(nvcc: str) -> str:
    """The CUDA release X.Y of an nvcc."""
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", said)
    if found is None:
        raise SystemExit(f"tdpo_ext: {nvcc} --version names no release")
    return found.group(1)


def cuda_arguments(torch_cuda: str | None) -> tuple[list[str], str]:
    """CMake arguments for the CUDA kernels, and a description of what is built."""
    requested, nvcc = os.environ.get("TDPO_CUDA", "auto"), find_nvcc()
    if requested not in ("auto", "0", "1"):
        raise SystemExit(f"tdpo_ext: TDPO_CUDA is {requested!r}; allowed are auto, 0 and 1")
    if requested == "1" and nvcc is None:
        raise SystemExit("tdpo_ext: TDPO_CUDA=1, but nvcc was not found")
    if requested == "0":
        reasons = ["TDPO_CUDA=0"]
    else:
        reasons = ["torch is a CPU build"] if torch_cuda is None and requested == "auto" else []
        reasons += ["nvcc was not found"] if nvcc is None else []
    if reasons or nvcc is None:
        return ["-DTDPO_CUDA=OFF", "-DTDPO_CUDA_VERSION="], "CPU only: " + " and ".join(reasons)
    archs, release = os.environ.get("TDPO_CUDA_ARCHS"), cuda_release(nvcc)
    # Without a request, an earlier one that CMake has cached must not remain.
    archs_argument = f"-DTDPO_CUDA_ARCHS={archs}" if archs else "-UTDPO_CUDA_ARCHS"
    return (
        ["-DTDPO_CUDA=ON", f"-DTDPO_CUDA_VERSION={release}", archs_argument, f"-DCMAKE_CUDA_COMPILER={nvcc}"],
        f"CPU and CUDA {release} ({archs or 'default architectures'}) with {nvcc}",
    )


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        import pybind11
        import torch

        torch_root = Path(torch.__file__).parent
        include = [torch_root / "include", torch_root / "include/torch/csrc/api/include"]
        cuda, description = cuda_arguments(torch.version.cuda)
        print(f"tdpo_ext: building with torch {torch.__version__}, {description}", file=sys.stderr, flush=True)
        destination = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
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
            f"-DTDPO_TORCH_VERSION={torch.__version__}",
            f"-DTDPO_TORCH_INCLUDE={';'.join(map(str, include))}",
            f"-DTDPO_TORCH_LIB={torch_root / 'lib'}",
            f"-DTDPO_TORCH_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
            f"-DCMAKE_INSTALL_PREFIX={destination}",
            f"-DTDPO_OLDEST_TORCH={oldest_torch(self.distribution.install_requires)}",
            brgemm_argument(),
            *cuda,
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        (destination / "_brgemm.so").unlink(missing_ok=True)  # left by an earlier build
        for command in (configure, [cmake, "--build", str(build)], [cmake, "--install", str(build)]):
            subprocess.run(command, check=True)
        if self.editable_mode:  # setuptools copies only the module itself into the source tree
            for built in ("_built_with.py", "_brgemm.so"):
                if (destination / built).exists():
                    shutil.copy(destination / built, ROOT / "tdpo_ext")


if __name__ == "__main__":
    setup(
        ext_modules=[Extension("tdpo_ext._C", sources=[])],
        cmdclass={"build_ext": CMakeBuild},
        options={"egg_info": {"tag_build": local_version()}},
    )
