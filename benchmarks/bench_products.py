"""Logits of few rows: this library's products beside torch.mm.

    python benchmarks/bench_products.py [--rounds 7] [--output FOLDER]

hidden (rows, D) times the transposed weight (V, D), into float32 logits. Where the logits take less memory than the
weight, the operands are exchanged: the weight is read as it lies, and the result transposed. torch.mm rounds bfloat16
results to bfloat16. CPU seconds over threads, the least of interleaved rounds. Results go to bench_products.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, save, text_table

from tdpo_ext.ops.matmul import describe_brgemm, product

SHAPES = ((262_144, 512), (262_144, 640), (50_257, 2048))  # vocabulary, width
ROWS = (64, 128, 256, 512, 1024)


def cpu_seconds(function: Callable[[], object]) -> float:
    before = os.times()
    function()
    after = os.times()
    return (after.user + after.system - before.user - before.system) / torch.get_num_threads()


def measured(vocab: int, width: int, rows: int, dtype: torch.dtype, rounds: int) -> dict:
    torch.manual_seed(0)
    weight, hidden = torch.randn(vocab, width).to(dtype), torch.randn(rows, width).to(dtype)
    logits, rounded = torch.empty(rows, vocab), torch.empty(rows, vocab, dtype=dtype)
    candidates = {
        "tdpo_ext": lambda: product(hidden, weight.t(), logits),
        "torch.mm": lambda: torch.mm(hidden, weight.t(), out=rounded),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            seconds[name].append(cpu_seconds(function))
    least = {name: min(found) for name, found in seconds.items()}
    case = {"vocab": vocab, "width": width, "rows": rows, "dtype": str(dtype).removeprefix("torch.")}
    exchanged = rows * logits.itemsize <= width * weight.itemsize
    return {**case, "exchanged": exchanged, **least, "ratio": least["tdpo_ext"] / least["torch.mm"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: list[dict] = []
    for dtype in (torch.float32, torch.bfloat16):
        for vocab, width in SHAPES:
            for rows in ROWS:
                results.append(measured(vocab, width, rows, dtype, arguments.rounds))
                save("bench_products", {"products": describe_brgemm(), "results": results}, arguments.output)
    print(text_table(results, ["dtype", "vocab", "width", "rows", "exchanged", "tdpo_ext", "torch.mm", "ratio"]))


if __name__ == "__main__":
    main()
