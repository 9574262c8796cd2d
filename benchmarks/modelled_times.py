"""What GPUs are predicted to take, from counts and a few assumptions: nothing here is measured on one.

    python benchmarks/modelled_times.py [--output FOLDER]

Row kernels: instructions of their machine code (`make machine-code`) and bytes that must move; of these two limits the
longer counts, and a part of the shorter. Fused steps: the products, the row kernels over all entries, the sums of dW
that the plan moves, and small kernels. Plans: the planner's own model, in which row kernels are left out. Results and
assumptions go to benchmarks/results/modelled_times.json; `benchmarks/gpu_facts.py` measures what would disprove them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch
from planned import step_plan, step_sizes

from tdpo_ext.fused.planning.costs import RATES, forward_work
from tdpo_ext.fused.planning.plan import ChunkedPlan, cuda_budget

RESULTS = Path(__file__).parent / "results"

# Operations of bfloat16 products and bytes of a copy, reads and writes together, a second.
MACHINES = {"H200": {"products": 790e12, "copy": 4.3e12}, "H100": {"products": 700e12, "copy": 2.95e12}}
INSTRUCTIONS, SPECIAL_FUNCTIONS = 33.4e12, 4.2e12  # a second, of 132 multiprocessors at 1.98 GHz
SHORTER_LIMIT = 0.2  # the part of it that adds to the longer one
SMALL_KERNELS = 0.1  # milliseconds a chunk, about 40 launches; rows lie in place and are not copied
# A row kernel disproves the model below this part of its predicted share; a step, if it takes so many times its
# products more than predicted.
KERNEL_DISPROVES, STEP_DISPROVES = 0.9, 0.08


class Kernel(NamedTuple):
    """A row kernel. An entry is a logit of both rows."""

    name: str
    instructions: float  # an entry, for sm_90
    special: int  # functions among them
    registers: int
    bytes: float  # an entry

    def seconds(self, copy: float) -> float:
        """Of an entry."""
        limits = sorted((self.bytes / copy, self.seconds_of_instructions))
        return limits[1] + SHORTER_LIMIT * limits[0]

    @property
    def seconds_of_instructions(self) -> float:
        return max(self.instructions / INSTRUCTIONS, self.special / SPECIAL_FUNCTIONS)


FUSED_FORWARD = Kernel("forward, float32", 28.8, 2, 79, 8)
FUSED_BACKWARD = Kernel("backward, float32 to bfloat16", 9.8, 2, 56, 10)
KERNELS = [
    Kernel("forward, bfloat16", 26.9, 2, 79, 4),
    FUSED_FORWARD,
    Kernel("forward, bfloat16, softcap", 54.8, 6, 80, 4),
    Kernel("forward, bfloat16, reverse KL", 26.9, 2, 79, 4),
    Kernel("backward, bfloat16", 10.1, 2, 70, 6),
    FUSED_BACKWARD,
    Kernel("backward, bfloat16, softcap", 39.2, 6, 119, 6),
    Kernel("backward, bfloat16, reverse KL", 15.1, 1, 72, 6),
]
# Chosen rows of TDPO2 have no gradient through the KL, and their reference is not read: 6 bytes, not 10.
MEAN_BACKWARD = FUSED_BACKWARD._replace(bytes=8)

WIDTH, PAIR_ROWS, MEMORY = 4096, 1024, 80 << 30
SHAPES = [(4096, 128_256), (8192, 128_256), (8192, 151_936), (16_384, 128_256), (8192, 262_144)]


def modelled_kernel(kernel: Kernel) -> dict:
    copies = {name: machine["copy"] for name, machine in MACHINES.items()}
    shares = {name: kernel.bytes / copy / kernel.seconds(copy) for name, copy in copies.items()}
    return {
        "kernel": kernel.name,
        "instructions": kernel.instructions,
        "special": kernel.special,
        "registers": kernel.registers,
        "bytes": kernel.bytes,
        "entries_by_instructions": 1 / kernel.seconds_of_instructions,
        "entries_by_memory": {name: copy / kernel.bytes for name, copy in copies.items()},
        "of_copy": shares,
        "disproved_below": {name: KERNEL_DISPROVES * share for name, share in shares.items()},
    }


def modelled_step(rows: int, vocab: int) -> dict:
    """Of TDPO with bfloat16 weights, a head that trains and the default budget."""
    sizes = step_sizes(vocab, WIDTH, torch.bfloat16)
    plan = step_plan(rows // PAIR_ROWS, PAIR_ROWS, sizes, cuda_budget(MEMORY), "cuda")
    assert isinstance(plan, ChunkedPlan)
    work, rates = forward_work(sizes, rows, plan.steps), RATES["cuda", True]
    return {
        "rows": rows,
        "vocab": vocab,
        "rows_at_a_time": plan.rows,
        "dz_rows": plan.dz_rows,
        "temporaries": plan.bytes,
        "of_products_by_the_planner": work.seconds(rates) * rates.products / work.products,
        **{name: step_on(machine, rows * vocab, work.products, work.moved, plan) for name, machine in MACHINES.items()},
    }


def step_on(machine: dict, entries: int, multiply_adds: float, moved: float, plan: ChunkedPlan) -> dict:
    """Milliseconds by part on a machine, all parts together, and their ratio to the products."""
    parts = {
        "products": 2e3 * multiply_adds / machine["products"],
        "row kernels": 1e3 * entries * sum(k.seconds(machine["copy"]) for k in (FUSED_FORWARD, MEAN_BACKWARD)),
        "dW": 1e3 * moved / machine["copy"],
        "small kernels": SMALL_KERNELS * plan.steps.blocks,
    }
    ratio = sum(parts.values()) / parts["products"]
    return {**parts, "ms": sum(parts.values()), "of_products": ratio, "disproved_above": ratio + STEP_DISPROVES}


def results() -> dict:
    return {
        "assumptions": {
            "machines": MACHINES,
            "instructions a second": INSTRUCTIONS,
            "special functions a second": SPECIAL_FUNCTIONS,
            "bytes an entry of the row kernels of a step, on average": FUSED_FORWARD.bytes + MEAN_BACKWARD.bytes,
            "rates of the planner": vars(RATES["cuda", True]),
            "width": WIDTH,
            "rows of a pair": PAIR_ROWS,
            "bytes of the GPU": MEMORY,
            "part of the shorter limit that adds to the longer": SHORTER_LIMIT,
            "milliseconds of small kernels a chunk": SMALL_KERNELS,
        },
        "kernels": [modelled_kernel(kernel) for kernel in KERNELS],
        "steps": [modelled_step(rows, vocab) for rows, vocab in SHAPES],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for modelled_times.json")
    path = parser.parse_args().output / "modelled_times.json"
    path.write_text(json.dumps(results(), indent=1) + "\n")
    print(f"saved {path}")


if __name__ == "__main__":
    main()
