"""Breaks the CUDA kernels in one way after another and shows that the emulator's tests catch each.

python tools/kernel_mutations.py [--only WORD] [--jobs 2]

Every mutation is applied to a copy of csrc/ and tests/cpp/, which is built and tested, first as it is and then under
the address and undefined-behaviour sanitizers. The exit status is 1 if a mutation survives both, or if the tests fail
without one. Needs cmake, ninja and a C++ compiler; takes minutes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "csrc/cuda/row_kernels.cuh"
SANITIZERS = "address,undefined"


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        """Edits the file below `root`.

        Raises:
            ValueError: the source no longer holds `old` exactly once.
        """
        path = root / self.file
        source = path.read_text()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {self.old!r} {source.count(self.old)} times, not once")
        path.write_text(source.replace(self.old, self.new))


MUTATIONS = [
    Mutation(
        "misaligned wide loads, gradient",
        KERNELS,
        "const bool aligned = is_aligned(z + split.head, 16) && (!reads_reference || is_aligned(r + split.head, 16));",
        "const bool aligned = true;",
    ),
    Mutation(
        "misaligned wide loads, states", KERNELS, "with_constant(is_aligned(r + split.head, 16),", "with_constant(true,"
    ),
    Mutation("half-warp mask", KERNELS, "__shfl_down_sync(0xffffffffu,", "__shfl_down_sync(0x0000ffffu,"),
    Mutation(
        "shuffle in two branches",
        KERNELS,
        "to[i] = __shfl_down_sync(0xffffffffu, from[i], distance);",
        "to[i] = threadIdx.x % 32 < 16 ? __shfl_down_sync(0xffffffffu, from[i], distance)"
        " : __shfl_down_sync(0xffffffffu, from[i], distance);",
    ),
    Mutation("dropped barrier", KERNELS, "    __syncthreads();\n", ""),
    Mutation(
        "stale shared memory",
        KERNELS,
        "if (threadIdx.x % kWarp == 0) warp_states",
        "if (threadIdx.x % kWarp == 0 && threadIdx.x < kGroup - kWarp) warp_states",
    ),
    Mutation("last warp not merged", KERNELS, "other < kGroup / kWarp;", "other < kGroup / kWarp - 1;"),
    Mutation(
        "tail ends one entry early",
        KERNELS,
        "v = head + packs * kPack + lane; v < count;",
        "v = head + packs * kPack + lane; v < count - 1;",
    ),
    Mutation(
        "tail ends one entry late",
        KERNELS,
        "v = head + packs * kPack + lane; v < count;",
        "v = head + packs * kPack + lane; v <= count;",
    ),
    Mutation(
        "head and tail swapped", KERNELS, "head = int((bytes - address % bytes) % bytes)", "head = int(address % bytes)"
    ),
    Mutation(
        "packs of a batch overlap",
        KERNELS,
        "z_pack[b] = load_pack<true>(z + v + b * kGroup * kPack);",
        "z_pack[b] = load_pack<true>(z + v + b * kPack);",
    ),
    Mutation("wrong slice merged", KERNELS, "states[slice * rows + row]", "states[row * slices + slice]"),
    Mutation("32-bit row offset", "csrc/params.h", "? row * inner_stride", "? int32_t(row * inner_stride)"),
    Mutation(
        "label of the wrong slice",
        KERNELS,
        "const int64_t at = label - params.vocab_start - part.begin;",
        "const int64_t at = label - params.vocab_start;",
    ),
    Mutation(
        "label of the wrong tile",
        KERNELS,
        "const int64_t label_at = label - params.vocab_start - part.begin;",
        "const int64_t label_at = label - params.vocab_start;",
    ),
    Mutation("label written by another lane", KERNELS, "after_head / kPack : tail", "after_head : tail"),
    Mutation(
        "label's logits read after they are overwritten",
        KERNELS,
        "if (has_label) out[label_at] = at_label;",
        "if (has_label) out[label_at] = dz_at(label_at, std::true_type{});",
    ),
    Mutation("every lane reports a bad label", KERNELS, "if (part.lane == 0 && part.index == 0) {", "{"),
    Mutation("reference skipped where it counts", KERNELS, "kl_grad != Real(0);", "kl_grad > Real(0);"),
    Mutation(
        "infinite logits not tested",
        KERNELS,
        "!(fabs(sums.gap + sums.bregman + sums.z_dot) < std::numeric_limits<Real>::infinity())",
        "false",
    ),
    Mutation("maxima far apart not noticed", KERNELS, "if (shifts.far_apart() ||", "if ("),
    Mutation(
        "the reverse KL's states merged as the forward one's",
        "csrc/cuda/launch.cu",
        "with_constant(kind.reverse_kl,",
        "with_constant(false,",
    ),
    Mutation("softcap's polynomial too far", "csrc/cuda/device.h", "fabs(u) < 0.6f", "fabs(u) < 0.9f"),
    Mutation(
        "scaling misses the last entry",
        KERNELS,
        "i < count - packs * kPack; i += threads",
        "i < count - packs * kPack - 1; i += threads",
    ),
]


def complaint(mutation: Mutation | None, sanitize: bool) -> str | None:
    """What the emulator's tests say about the mutated kernels; None if they pass."""
    with tempfile.TemporaryDirectory() as scratch:
        root, build = Path(scratch, "source"), Path(scratch, "build")
        for folder in ("csrc", "tests/cpp"):
            shutil.copytree(ROOT / folder, root / folder)
        shutil.copy(ROOT / "CMakeLists.txt", root)
        if mutation:
            mutation.apply(root)
        # Not a build type of ours: -O1 compiles in half the time.
        configure = [
            "cmake",
            "-S",
            str(root),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DTDPO_TESTS=ON",
            "-DCMAKE_BUILD_TYPE=None",
        ]
        configure += ["-DCMAKE_CXX_FLAGS=-O1", f"-DTDPO_SANITIZE={SANITIZERS if sanitize else ''}"]
        for command in (configure, ["cmake", "--build", str(build), "--target", "cuda_kernels_test"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        try:
            done = subprocess.run(
                [str(build / "tests/cpp/cuda_kernels_test")],
                capture_output=True,
                text=True,
                timeout=300,
                errors="replace",
            )
        except subprocess.TimeoutExpired:
            return "does not end"
    if done.returncode == 0:
        return None
    lines = (done.stdout + done.stderr).splitlines()
    telling = [line for line in lines if "FAILED" in line or "rror:" in line or "what():" in line]
    return (telling or lines or [f"exit status {done.returncode}"])[0].strip()


def caught_by(mutation: Mutation) -> tuple[str, str] | None:
    """Which build of the tests caught the mutation, and how."""
    for build in ("tests", "sanitizers"):
        said = complaint(mutation, sanitize=build == "sanitizers")
        if said is not None:
            return build, said
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the mutations whose name contains this")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    for sanitize in (False, True):
        if said := complaint(None, sanitize):
            sys.exit(f"the tests fail without a mutation: {said}")
    chosen = [mutation for mutation in MUTATIONS if arguments.only in mutation.name]
    survivors = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for mutation, caught in zip(chosen, pool.map(caught_by, chosen)):
            survivors += caught is None
            build, said = caught or ("SURVIVED", "")
            print(f"{mutation.name:48s} {build:10s} {said[:110]}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
