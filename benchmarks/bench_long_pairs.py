"""Pairs that are too long for the budget: the deferred plan against the streaming plan and the matrix products alone.

    python benchmarks/bench_long_pairs.py [--rounds 2] [--shapes 0 1 2 ...]

Step: forward and backward of TDPO2 at a budget of 256 MiB, bfloat16, D 512, pairs of 512, 2,048 and 8,192 rows at V
50,257, 151,936 and 262,144, all candidates in turn in one run. "deferred": as planned for a margin loss. "streaming":
the same objective as an ordinary function, which the planner can't defer. "frozen head": as planned, without a gradient
of the weight. "products" and "three products": the four products that a step needs at least and, with a frozen head,
three, by torch.mm in bfloat16, 512 rows at a time. Each candidate's plan is stored.

Seconds are those of the wall clock and, as a machine that others use makes them depend on the others, CPU seconds of
both threads together; the median and the least of the rounds. Before each timed run, the same run without scratch
memory of earlier calls is its warm-up, as one training step is of the next, and measures extra memory: the peak beyond
inputs and gradients, by the kernel's account (Linux). The script is apart from bench_linear.py because nine shapes take
it about an hour. Results go to benchmarks/results/bench_long_pairs.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import save, text_table

import tdpo_ext.fused.call
from tdpo_ext import linear_preference_loss, tdpo_loss
from tdpo_ext.fused.planning.choose import make_plan

BUDGET, WIDTH = 256 << 20, 512
SHAPES = [
    (pairs, pair_rows, vocab)
    for pairs, pair_rows in ((4, 512), (2, 2048), (1, 8192))
    for vocab in (50257, 151936, 262144)
]
DEFERRED = functools.partial(tdpo_loss, beta=0.1)


def not_a_margin_loss(chosen, rejected):
    """The same loss, but the planner does not know that its margin is linear."""
    return DEFERRED(chosen, rejected)


class Step:
    """Inputs of one training step."""

    def __init__(self, pairs: int, pair_rows: int, vocab: int):
        torch.manual_seed(0)
        rows = (2 * pairs, pair_rows // 2)
        self.hidden = torch.randn(*rows, WIDTH).bfloat16().requires_grad_()
        self.weight = (torch.randn(vocab, WIDTH) / WIDTH**0.5).bfloat16().requires_grad_()
        self.inputs = {
            "hidden": self.hidden,
            "weight": self.weight,
            "ref_hidden": (self.hidden.detach().float() + 0.1 * torch.randn(*rows, WIDTH)).bfloat16(),
            "ref_weight": self.weight.detach().clone(),
            "labels": torch.randint(vocab, rows),
        }
        self.plan = ""

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def run(self, objective, frozen_head: bool = False) -> None:
        def recorded(*arguments, **options):
            plan = make_plan(*arguments, **options)
            self.plan = str(plan)
            return plan

        inputs = {**self.inputs, "weight": self.weight.detach()} if frozen_head else self.inputs
        tdpo_ext.fused.call.make_plan = recorded
        linear_preference_loss(objective, **inputs, logits_budget=BUDGET)[0].backward()
        tdpo_ext.fused.call.make_plan = make_plan  # drops the reference to this step

    def products(self, frozen_head: bool = False) -> None:
        hidden, weight = self.hidden.detach().flatten(0, 1), self.weight.detach()
        ref_hidden, ref_weight = self.inputs["ref_hidden"].flatten(0, 1), self.inputs["ref_weight"]
        logits = torch.empty(512, len(weight), dtype=torch.bfloat16)
        dweight = None if frozen_head else torch.zeros_like(weight)
        for first in range(0, len(hidden), 512):
            rows = slice(first, first + 512)
            torch.mm(hidden[rows], weight.t(), out=logits)
            torch.mm(ref_hidden[rows], ref_weight.t(), out=logits)
            torch.mm(logits, weight)
            if dweight is not None:
                dweight.addmm_(logits.t(), hidden[rows])


def candidates(step: Step) -> dict[str, Callable[[], None]]:
    return {
        "deferred": functools.partial(step.run, DEFERRED),
        "streaming": functools.partial(step.run, not_a_margin_loss),
        "products": step.products,
        "frozen head": functools.partial(step.run, DEFERRED, frozen_head=True),
        "three products": functools.partial(step.products, frozen_head=True),
    }


FLOOR = {"deferred": "products", "streaming": "products", "frozen head": "three products"}


def peak_resident(reset: bool = False) -> int:
    """Peak resident bytes since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def peak_extra(run: Callable[[], None]) -> int:
    """Peak bytes of a run that starts without scratch memory."""
    gc.collect()
    tdpo_ext.release_scratch()
    before = peak_resident(reset=True)
    run()
    return peak_resident() - before


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Wall seconds and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def measure(shape: tuple[int, int, int], rounds: int) -> dict:
    pairs, pair_rows, vocab = shape
    step = Step(*shape)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates(step)}
    plans, extra, load = {}, {}, []
    for _ in range(rounds):
        for name, run in candidates(step).items():
            step.clear()
            step.plan = ""
            extra[name] = peak_extra(run)
            plans[name] = step.plan
            step.clear()
            load.append(os.getloadavg()[0])
            runs[name].append(timed(run))
    least = {name: min(cpu for _, cpu in series) for name, series in runs.items()}
    rows = []
    for name, series in runs.items():
        gradients = step.hidden.nbytes + (0 if name == "frozen head" else step.weight.nbytes)
        rows.append(
            {
                "candidate": name,
                "plan": plans[name],
                "wall_seconds": statistics.median(wall for wall, _ in series),
                "least_wall_seconds": min(wall for wall, _ in series),
                "cpu_seconds": statistics.median(cpu for _, cpu in series),
                "least_cpu_seconds": least[name],
                "over_products": least[name] / least[FLOOR.get(name, name)],
                "extra_mb": (extra[name] - gradients) / 2**20 if name in FLOOR else None,
            }
        )
    return {
        "pairs": pairs,
        "pair_rows": pair_rows,
        "vocab": vocab,
        "rounds": rounds,
        "load": [round(value, 1) for value in load],
        "candidates": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds")
    parser.add_argument(
        "--shapes", type=int, nargs="+", default=range(len(SHAPES)), help="which of the nine, by number"
    )
    arguments = parser.parse_args()
    results: dict = {"budget": BUDGET, "width": WIDTH, "dtype": "bfloat16", "steps": []}
    for index in arguments.shapes:
        result = measure(SHAPES[index], arguments.rounds)
        results["steps"].append(result)
        print("\n{pairs} pairs of {pair_rows} rows, V {vocab}, load {load}".format(**result))
        columns = ["candidate", "wall_seconds", "cpu_seconds", "over_products", "extra_mb"]
        print(text_table(result["candidates"], columns), flush=True)
        save("bench_long_pairs", results)  # shape by shape: an interrupted run loses one


if __name__ == "__main__":
    main()
