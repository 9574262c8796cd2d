"""Pairs that are too long for the budget: the deferred plan against the streaming plan and the matrix products alone.

    python benchmarks/bench_long_pairs.py [--rounds 2]

Step: forward and backward of TDPO2 at a budget of 256 MiB, bfloat16, D 512, pairs of 512, 2,048 and 8,192 rows at V
50,257, 151,936 and 262,144, all candidates in turn in one run. "deferred": as planned. "streaming": the same objective
as an ordinary function, which the planner can't defer. "products": the four products alone, by torch.mm in bfloat16,
512 rows at a time. Each candidate's plan is stored. Extra memory is beyond inputs and gradients, each measured
in a process of its own. Results go to benchmarks/results/bench_long_pairs.json.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import subprocess
import sys

import torch
from common import medians, peak_extra_bytes, save, text_table

import tdpo_ext.linear
from tdpo_ext import linear_preference_loss, tdpo_loss
from tdpo_ext.fused.plan import make_plan

BUDGET, WIDTH = 256 << 20, 512
SHAPES = [
    (pairs, pair_rows, vocab)
    for vocab in (50257, 151936, 262144)
    for pairs, pair_rows in ((4, 512), (2, 2048), (1, 8192))
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

    def run(self, objective, budget: int) -> None:
        def recorded(*arguments, **options):
            plan = make_plan(*arguments, **options)
            self.plan = str(plan)
            return plan

        tdpo_ext.linear.make_plan = recorded
        linear_preference_loss(objective, **self.inputs, logits_budget=budget)[0].backward()

    def products(self) -> None:
        hidden, weight = self.hidden.detach().flatten(0, 1), self.weight.detach()
        ref_hidden, ref_weight = self.inputs["ref_hidden"].flatten(0, 1), self.inputs["ref_weight"]
        logits = torch.empty(512, len(weight), dtype=torch.bfloat16)
        dweight = torch.zeros_like(weight)
        for first in range(0, len(hidden), 512):
            rows = slice(first, first + 512)
            torch.mm(hidden[rows], weight.t(), out=logits)
            torch.mm(ref_hidden[rows], ref_weight.t(), out=logits)
            torch.mm(logits, weight)
            dweight.addmm_(logits.t(), hidden[rows])


def candidates(step: Step) -> dict:
    return {
        "deferred": functools.partial(step.run, DEFERRED, BUDGET),
        "streaming": functools.partial(step.run, not_a_margin_loss, BUDGET),
        "products": step.products,
    }


def extra_mb(shape: tuple[int, int, int], name: str) -> float:
    """Peak memory of one candidate, in a fresh process."""
    command = [sys.executable, __file__, "--memory", name, *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(shape: tuple[int, int, int], rounds: int) -> dict:
    pairs, pair_rows, vocab = shape
    step = Step(*shape)
    runs = candidates(step)
    seconds = medians(runs, rounds, prepare=step.clear)
    rows = []
    for name in runs:
        step.clear()
        step.plan = ""
        if name != "products":
            runs[name]()
        rows.append(
            {
                "candidate": name,
                "plan": step.plan,
                "seconds": seconds[name],
                "over_products": seconds[name] / seconds["products"],
                "extra_mb": None if name == "products" else extra_mb(shape, name),
            }
        )
    del step, runs
    gc.collect()
    return {"pairs": pairs, "pair_rows": pair_rows, "vocab": vocab, "candidates": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds; medians are reported")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        name, *shape = arguments.memory
        step = Step(*map(int, shape))
        gradients = step.hidden.nbytes + step.weight.nbytes
        extra = peak_extra_bytes(candidates(step)[name]) - gradients
        print(json.dumps(extra / 2**20))
        return
    results: dict = {"budget": BUDGET, "width": WIDTH, "dtype": "bfloat16", "steps": []}
    for shape in SHAPES:
        result = measure(shape, arguments.rounds)
        results["steps"].append(result)
        print("\n{pairs} pairs of {pair_rows} rows, V {vocab}".format(**result))
        print(text_table(result["candidates"], ["candidate", "seconds", "over_products", "extra_mb"]), flush=True)
        save("bench_long_pairs", results)  # shape by shape: an interrupted run loses one


if __name__ == "__main__":
    main()
