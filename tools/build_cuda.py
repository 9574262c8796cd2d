"""Whether a build has CUDA kernels, for which architectures, and with which nvcc.

The build backend requests what setup.py then uses, so both ask here. `choose` follows the environment variables
TDPO_CUDA and TDPO_CUDA_ARCHS, which setup.py describes.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# NVIDIA's compiler, the headers that it needs and the runtime to link with. Below CUDA 13 the packages hold no nvcc.
PACKAGES = "cuda-toolkit[nvcc,cudart,cccl]"
OLDEST_PACKAGED = 13
OLDEST_ARCHITECTURE = 80  # the kernels use instructions that came with it


@dataclass(frozen=True)
class Compiler:
    """An nvcc.

    Args:
        nvcc: its path.
        packaged: whether it comes from NVIDIA's Python packages, whose layout CMake does not know.
    """

    nvcc: Path
    packaged: bool = False

    @property
    def release(self) -> str:
        """Its CUDA release, X.Y.

        Raises:
            SystemExit: it does not say.
        """
        said = subprocess.run([self.nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        found = re.search(r"release (\d+\.\d+)", said)
        if found is None:
            raise SystemExit(f"tdpo_ext: {self.nvcc} --version names no CUDA release")
        return found.group(1)

    @property
    def major(self) -> str:
        return self.release.split(".")[0]


@dataclass(frozen=True)
class Choice:
    """What a build does about CUDA.

    Args:
        why_not: why there are no CUDA kernels; empty where there are.
        archs: architectures, separated by semicolons; empty: those of csrc/cuda/cuda.cmake.
        compiler: what compiles the kernels; None without kernels, and where `requirement` is not installed yet.
        requirement: the packages that hold the compiler, where this machine has none.
    """

    why_not: str = ""
    archs: str = ""
    compiler: Compiler | None = None
    requirement: str | None = None

    def __str__(self) -> str:
        if self.compiler is None:
            return f"CPU only ({self.why_not})"
        archs = self.archs.replace(";", ", ") or "default"
        return f"CPU and CUDA {self.compiler.release} (architectures: {archs}) with {self.compiler.nvcc}"

    @property
    def folder(self) -> str:
        """The end of a build folder's name: where the path of a compiler has changed, CMake starts anew, without its
        arguments."""
        if self.compiler is None:
            return ""
        return f"-cuda-{self.compiler.release}{'-packages' if self.compiler.packaged else ''}"


def visible_architectures() -> list[int]:
    """Compute capabilities of the GPUs that CUDA's driver shows, such as [80, 90]; [] without GPU or driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return []
    found = set()
    for device in range(count.value):
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        found.add(10 * major.value + minor.value)
    return sorted(found)


def find_compiler(torch_cuda: str | None = None) -> Compiler | None:
    """The nvcc to use: CUDA_HOME's, else one on the PATH or in NVIDIA's packages, of torch's major CUDA release.

    Args:
        torch_cuda: torch's CUDA release, X.Y; None: any will do.

    Raises:
        SystemExit: CUDA_HOME is of another major release.
    """
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and Path(home, "bin", "nvcc").exists():
        named = Compiler(Path(home, "bin", "nvcc"))
        if torch_cuda is not None and named.major != torch_cuda.split(".")[0]:
            raise SystemExit(
                f"tdpo_ext: CUDA_HOME, {home}, is of CUDA {named.release}, and torch of CUDA {torch_cuda}: name a "
                "toolkit of that CUDA, or unset CUDA_HOME"
            )
        return named
    on_path = shutil.which("nvcc")
    found = [Compiler(Path(on_path))] if on_path else []
    for folder in sys.path:
        for root in Path(folder).glob("nvidia/cu[0-9]*"):
            if (
                (root / "bin/nvcc").exists()
                and (root / "include/cccl").exists()
                and any(root.glob("lib/libcudart.so*"))
            ):
                found.append(Compiler(root / "bin/nvcc", packaged=True))
    return next((one for one in found if torch_cuda is None or one.major == torch_cuda.split(".")[0]), None)


def _is_supported(architecture: str) -> bool:
    """Whether kernels are compiled for an architecture, such as 90 or 90a."""
    number = re.fullmatch(r"(\d+)[af]?(-real|-virtual)?", architecture)
    return number is not None and int(number[1]) >= OLDEST_ARCHITECTURE


def choose(torch_cuda: str | None, torch_known: bool = True) -> Choice:
    """What a build with this torch does about CUDA.

    Args:
        torch_cuda: torch's CUDA release, X.Y; None: it is no CUDA build.
        torch_known: False: torch is not installed yet, and the package index decides which build it is.

    Raises:
        SystemExit: TDPO_CUDA or TDPO_CUDA_ARCHS has no such value, or CUDA kernels were asked for and nothing can
            compile them.
    """
    requested, archs = os.environ.get("TDPO_CUDA", "auto"), os.environ.get("TDPO_CUDA_ARCHS", "")
    if requested not in ("auto", "0", "1"):
        raise SystemExit(f"tdpo_ext: TDPO_CUDA is {requested!r}; allowed are auto, 0 and 1")
    if requested == "0":
        return Choice("TDPO_CUDA=0")
    if archs and not all(map(_is_supported, archs.split(";"))):
        raise SystemExit(
            f"tdpo_ext: TDPO_CUDA_ARCHS is {archs!r}; architectures from {OLDEST_ARCHITECTURE} on are needed, such as "
            "'80;90'"
        )
    if requested == "auto" and torch_known and torch_cuda is None:
        return Choice("torch is not a CUDA build")
    if requested == "auto" and not archs:
        visible = visible_architectures()
        archs = ";".join(str(architecture) for architecture in visible if architecture >= OLDEST_ARCHITECTURE)
        if not visible:
            return Choice("no GPU is visible; `TDPO_CUDA=1 pip install .` builds CUDA kernels all the same")
        if not archs:
            return Choice(
                f"the CUDA kernels are for GPUs from sm_{OLDEST_ARCHITECTURE} on; this one is sm_{visible[-1]}"
            )
    compiler = find_compiler(torch_cuda) if torch_known else None
    if compiler is not None:
        return Choice(archs=archs, compiler=compiler)
    if torch_cuda is None:
        return Choice(archs=archs, requirement=f"{PACKAGES}>={OLDEST_PACKAGED}")
    major = int(torch_cuda.split(".")[0])
    if major >= OLDEST_PACKAGED:
        return Choice(archs=archs, requirement=f"{PACKAGES}=={torch_cuda}.*")
    lacking = (
        f"torch is of CUDA {torch_cuda}, and there is no nvcc of CUDA {major}, which no Python package holds: install "
        f"the CUDA toolkit {torch_cuda} and set CUDA_HOME, or install a torch of CUDA {OLDEST_PACKAGED}"
    )
    if requested == "1":
        raise SystemExit(f"tdpo_ext: {lacking}")
    return Choice(lacking)


def cmake_arguments(choice: Choice, link: Path) -> list[str]:
    """CMake's arguments for a choice.

    Args:
        link: where to make a link to the compiler's packages, which an isolated build has in a new folder each time.
    """
    compiler = choice.compiler
    if compiler is None:
        return ["-DTDPO_CUDA=OFF", "-DTDPO_CUDA_VERSION="]
    nvcc, layout = compiler.nvcc, []
    if compiler.packaged:
        link.unlink(missing_ok=True)
        link.symlink_to(nvcc.parents[1])
        nvcc, libraries = link / "bin/nvcc", link / "lib"
        # nvcc and CMake look for the libraries in lib64, under names without a version.
        layout = [
            f"-DCMAKE_CUDA_FLAGS=-L{libraries}",
            f"-DCUDA_cudart_LIBRARY={libraries}/libcudart.so.{compiler.major}",
        ]
        layout.append(f"-DCUDA_CUDART={libraries}/libcudart.so.{compiler.major}")
    # Without a request, an earlier one that CMake has cached must not remain.
    archs = f"-DTDPO_CUDA_ARCHS={choice.archs}" if choice.archs else "-UTDPO_CUDA_ARCHS"
    return [
        "-DTDPO_CUDA=ON",
        f"-DTDPO_CUDA_VERSION={compiler.release}",
        archs,
        f"-DCMAKE_CUDA_COMPILER={nvcc}",
        *layout,
    ]
