"""Compiles the CUDA kernels with warnings as errors and prints what each needs: registers, spills, shared memory.

python buildtools/cuda_report.py [ARCHITECTURE ...]      (default: 80 90 100; needs nvcc and c++filt)
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent.parent / "csrc" / "cuda" / "token_divergence.cu"
FLAGS = ["-std=c++17", "-O3", "--extended-lambda", "--expt-relaxed-constexpr", "-Werror", "all-warnings"]


def kernel_report(architectures: list[int]) -> list[dict]:
    """A row per kernel and architecture: architecture, kernel, registers, spilled bytes, shared bytes.

    Raises:
        RuntimeError: the kernels don't compile, or not without warnings; the message is the compiler's.
    """
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    with tempfile.TemporaryDirectory() as scratch:
        command = ["nvcc", *FLAGS, *targets, "--threads", "0", "-Xptxas", "-v"]
        command += ["-c", str(SOURCE), "-o", f"{scratch}/kernels.o"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stderr)
    rows: list[dict] = []
    current: dict = {}
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\d+)'", line):
            current = {"architecture": int(found[2]), "kernel": found[1]}
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["spilled"] = int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            shared = re.search(r"(\d+) bytes smem", line)
            rows.append({**current, "registers": int(found[1]), "shared": int(shared[1]) if shared else 0})
    names = subprocess.run(["c++filt"], input="\n".join(row["kernel"] for row in rows), capture_output=True, text=True)
    for row, name in zip(rows, names.stdout.splitlines()):
        row["kernel"] = re.sub(r"^void |tdpo::cuda::|\(.*$", "", name)
    return rows


def main() -> None:
    rows = kernel_report([int(arch) for arch in sys.argv[1:]] or [80, 90, 100])
    print(f"{'sm':>4s} {'registers':>9s} {'spilled':>8s} {'shared':>7s}  kernel")
    for row in rows:
        print("{architecture:4d} {registers:9d} {spilled:8d} {shared:7d}  {kernel}".format(**row))


if __name__ == "__main__":
    main()
