"""Compiles the CUDA kernels with warnings as errors and prints the resources of each: registers, spills, shared memory.

python tools/cuda_report.py [ARCHITECTURE ...]      (default: those of csrc/cuda/cuda.cmake)

Needs nvcc, cmake, ninja and c++filt; no GPU and no torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str) -> str:
    """Standard output of a command.

    Raises:
        RuntimeError: the command failed; the message is its output.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout


def build_kernels(build: Path, architectures: Sequence[int]) -> str:
    """What ptxas reports for the kernels, built by CMake with the flags of the extension.

    Leaves the machine code of each architecture in `build`, as launch*sm_NN.cubin.
    """
    configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DTDPO_CUDA=ON"]
    configure.append(f"-DCMAKE_CUDA_FLAGS=-Werror all-warnings -Xptxas -v --keep --keep-dir {build}")
    if architectures:
        configure.append(f"-DTDPO_CUDA_ARCHS={';'.join(map(str, architectures))}")
    run(*configure)
    return run("cmake", "--build", str(build), "--target", "cuda_kernels")


def short_names(kernels: Sequence[str]) -> list[str]:
    """Kernels as the source names them, without namespaces and parameters."""
    return [re.sub(r"^void |tdpo::(cuda::)?|\(.*$", "", name) for name in run("c++filt", *kernels).splitlines()]


def parse_resources(compiler_output: str) -> list[dict]:
    """One row per kernel and architecture: architecture, kernel, registers, spilled bytes, shared bytes."""
    rows: list[dict] = []
    current: dict = {}
    for line in compiler_output.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", line):
            current = {"architecture": int(match[2]), "kernel": match[1]}
        elif match := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["spilled"] = int(match[1]) + int(match[2])
        elif match := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append({**current, "registers": int(match[1]), "shared": int(shared[1]) if shared else 0})
    for row, name in zip(rows, short_names([row["kernel"] for row in rows])):
        row["kernel"] = name
    return rows


def kernel_report(architectures: Sequence[int] = ()) -> list[dict]:
    """`parse_resources` of a fresh build.

    Args:
        architectures: such as 90; empty: those that the extension is built for.

    Raises:
        RuntimeError: the kernels don't compile without warnings; the message is the compiler's.
    """
    with tempfile.TemporaryDirectory() as build:
        return parse_resources(build_kernels(Path(build), architectures))


def main() -> None:
    rows = kernel_report([int(architecture) for architecture in sys.argv[1:]])
    print(f"{'sm':>4s} {'registers':>9s} {'spilled':>8s} {'shared':>7s}  kernel")
    for row in rows:
        print("{architecture:4d} {registers:9d} {spilled:8d} {shared:7d}  {kernel}".format(**row))


if __name__ == "__main__":
    main()
