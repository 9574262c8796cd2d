"""Logits of few rows: this library's products beside torch.mm.

    python benchmarks/bench_products.py [--rounds 7] [--output FOLDER]

hidden (rows, D) times the transposed weight (V, D), in float32. Where there are no more rows than D, the operands are
exchanged: the weight is read as it lies, and the result transposed. CPU seconds over threads, the least of interleaved
rounds. Results go to bench_products.json.
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


def measured(vocab: int, width: int, rows: int, rounds: int) -> dict:
    torch.manual_seed(0)
    weight, hidden, logits = torch.randn(vocab, width), torch.randn(rows, width), torch.empty(rows, vocab)
    candidates = {
        "tdpo_ext": lambda: product(hidden, weight.t(), logits),
        "torch.mm": lambda: torch.mm(hidden, weight.t(), out=logits),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, function in candidates.items():
            seconds[name].append(cpu_seconds(function))
    least = {name: min(found) for name, found in seconds.items()}
    case = {"vocab": vocab, "width": width, "rows": rows, "exchanged": rows <= width}
    return {**case, **least, "ratio": least["tdpo_ext"] / least["torch.mm"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: list[dict] = []
    for vocab, width in SHAPES:
        for rows in ROWS:
            results.append(measured(vocab, width, rows, arguments.rounds))
            save("bench_products", {"products": describe_brgemm(), "results": results}, arguments.output)
    print(text_table(results, ["vocab", "width", "rows", "exchanged", "tdpo_ext", "torch.mm", "ratio"]))


if __name__ == "__main__":
    main()
