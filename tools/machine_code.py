"""Counts what the hot loop of each CUDA kernel costs, in the machine code that ptxas made of it.

python tools/machine_code.py [ARCHITECTURE, default 90] [--show KERNEL]

The hot loop is the one with the most 16-byte loads. Its cost is counted along the shortest way round: blocks that it
can skip, such as the rescaling after a new maximum, are not counted. Columns: entries that a thread processes in one
round, instructions for each of them (an entry is a logit of both rows), registers, 16-byte loads, and loads that stand
after the first use of a 16-byte load, each of which waits for memory once more. Needs nvcc, cmake, ninja, c++filt and
nvdisasm (of the CUDA toolkit, or of the Python package nvidia-cuda-nvdisasm); no GPU and no torch.
"""

from __future__ import annotations

import argparse
import heapq
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cuda_report import build_kernels, parse_resources, run, short_names

BYTES = {"float": 4, "double": 8, "bf16": 2, "f16": 2}


def find_disassembler() -> str | None:
    """nvdisasm: on the PATH, beside nvcc, or from the Python package nvidia-cuda-nvdisasm."""
    packaged = [path for folder in sys.path for path in sorted(Path(folder).glob("nvidia/*/bin/nvdisasm"))]
    nvcc = shutil.which("nvcc")
    candidates = [shutil.which("nvdisasm"), nvcc and Path(nvcc).resolve().parent / "nvdisasm", *packaged]
    return next((str(path) for path in candidates if path and Path(path).exists()), None)


class Instruction(NamedTuple):
    address: int
    predicate: str  # "" or such as "@!P0"
    opcode: str  # such as "LDG.E.128"
    operands: str

    @property
    def target(self) -> str | None:
        """The label that a branch jumps to."""
        match = re.search(r"`\((\.L_\w+)\)", self.operands)
        return match[1] if match and self.opcode.startswith("BRA") else None

    @property
    def always_leaves(self) -> bool:
        """Whether the instruction after this one is reached only by a jump."""
        name = self.opcode.split(".")[0]
        conditional = bool(self.predicate) or (name == "BRA" and re.match(r"!?U?P\d", self.operands) is not None)
        return name in ("BRA", "EXIT", "RET", "BRX", "JMP", "BPT") and not conditional

    @property
    def is_load(self) -> bool:
        return self.opcode.startswith("LDG")

    @property
    def is_wide_load(self) -> bool:
        return self.is_load and ".128" in self.opcode

    def loaded(self) -> set[int]:
        """The registers that a 16-byte load fills."""
        first = int(re.match(r"R(\d+)", self.operands)[1])  # type: ignore[index]
        return set(range(first, first + 4))

    def registers(self) -> set[int]:
        return {int(number) for number in re.findall(r"\bR(\d+)", self.operands)}


@dataclass
class Loop:
    path: list[Instruction]  # once round, the shortest way

    @property
    def wide_loads(self) -> int:
        return sum(instruction.is_wide_load for instruction in self.path)

    @property
    def loads_after_first_use(self) -> int:
        """Loads that are issued only after the results of an earlier 16-byte load have arrived."""
        pending: set[int] = set()
        for index, instruction in enumerate(self.path):
            if pending & instruction.registers():
                return sum(later.is_load for later in self.path[index:])
            if instruction.is_wide_load:
                pending |= instruction.loaded()
        return 0


@dataclass
class Kernel:
    name: str
    instructions: list[Instruction]
    labels: dict[str, int]  # label -> index of the instruction that follows it

    def shortest_path(self, start: int, end: int) -> list[Instruction] | None:
        """The instructions from `start` to `end`, by the way with the fewest of them, within [start, end]."""
        before: dict[int, int | None] = {}
        queue: list[tuple[int, int, int | None]] = [(1, start, None)]
        while queue:
            length, at, previous = heapq.heappop(queue)
            if at in before:
                continue
            before[at] = previous
            if at == end:
                path: list[int] = []
                step: int | None = end
                while step is not None:
                    path.append(step)
                    step = before[step]
                return [self.instructions[index] for index in reversed(path)]
            instruction = self.instructions[at]
            following = [] if instruction.always_leaves else [at + 1]
            if instruction.target in self.labels:
                following.append(self.labels[instruction.target])
            for step in following:
                if start < step <= end:
                    heapq.heappush(queue, (length + 1, step, at))
        return None

    @cached_property
    def hot_loop(self) -> Loop | None:
        loops = []
        for index, instruction in enumerate(self.instructions):
            head = self.labels.get(instruction.target or "", index + 1)
            if head <= index and (path := self.shortest_path(head, index)):
                loops.append(Loop(path))
        return max(loops, key=lambda loop: (loop.wide_loads, -len(loop.path)), default=None)


def parse(listing: str) -> list[Kernel]:
    """The kernels of a listing by `nvdisasm -c`."""
    kernels: list[Kernel] = []
    for line in listing.splitlines():
        if match := re.match(r"\.text\.(\w+):", line):
            kernels.append(Kernel(match[1], [], {}))
        elif not kernels:
            continue
        elif match := re.match(r"(\.L_\w+):", line):
            kernels[-1].labels[match[1]] = len(kernels[-1].instructions)
        elif match := re.match(r"\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+ )?\s*([\w.]+)\s*(.*?)\s*;", line):
            address, predicate, opcode, operands = match.groups()
            kernels[-1].instructions.append(Instruction(int(address, 16), (predicate or "").strip(), opcode, operands))
    for kernel, name in zip(kernels, short_names([kernel.name for kernel in kernels])):
        kernel.name = name
    return kernels


def hot_loops(build: Path, architecture: int, resources: list[dict]) -> list[dict]:
    """One row per kernel that has a loop with 16-byte loads.

    Args:
        build: the folder of `build_kernels`, and `resources` what `parse_resources` makes of its output.

    Raises:
        RuntimeError: there is no disassembler, or it failed.
    """
    disassembler = find_disassembler()
    if disassembler is None:
        raise RuntimeError("nvdisasm was not found: install the CUDA toolkit or `pip install nvidia-cuda-nvdisasm`")
    registers = {row["kernel"]: row["registers"] for row in resources if row["architecture"] == architecture}
    cubin = next(build.glob(f"launch*sm_{architecture}.cubin"))
    rows = []
    for kernel in parse(run(disassembler, "-c", str(cubin))):
        loop = kernel.hot_loop
        if loop is None or loop.wide_loads == 0:
            continue
        rows_read = 1 if kernel.name.startswith("scale") else 2
        scalar = re.search(r"<(\w+)", kernel.name)
        assert scalar is not None
        entries = loop.wide_loads * 16 // BYTES[scalar[1]] // rows_read
        rows.append(
            {
                "kernel": kernel.name,
                "entries": entries,
                "instructions_per_entry": len(loop.path) / entries,
                "registers": registers[kernel.name],
                "wide_loads": loop.wide_loads,
                "loads_after_first_use": loop.loads_after_first_use,
                "path": loop.path,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", type=int, nargs="?", default=90)
    parser.add_argument("--show", metavar="KERNEL", help="print the hot loop of kernels whose name contains this")
    arguments = parser.parse_args()
    print("entries  instructions an entry  registers  wide loads  loads after first use  kernel")
    with tempfile.TemporaryDirectory() as build:
        resources = parse_resources(build_kernels(Path(build), [arguments.architecture]))
        loops = hot_loops(Path(build), arguments.architecture, resources)
    for row in loops:
        print(
            "{entries:7d}  {instructions_per_entry:21.1f}  {registers:9d}  {wide_loads:10d}  "
            "{loads_after_first_use:21d}  {kernel}".format(**row)
        )
        if arguments.show and arguments.show in row["kernel"]:
            for instruction in row["path"]:
                print("    {address:5x} {predicate:5s} {opcode:20s} {operands}".format(**instruction._asdict()))


if __name__ == "__main__":
    main()
