"""The matrix products of the fused losses on a CPU: this library's beside torch.mm.

    python benchmarks/bench_products.py [--rounds 7] [--output FOLDER]

logits: hidden (rows, D) times the transposed weight (V, D), into float32. dhidden: dz (rows, V) times the weight. dW:
the transposed dz times hidden, and the same added to a float32 dW. torch.mm multiplies in the operands' dtype, and for
the last adds to a dW of it. CPU seconds over threads, the least of interleaved rounds. Results go to
bench_products.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import RESULTS, save, text_table

from tdpo_ext.ops.matmul import describe_brgemm, product

HEADS = ((262_144, 512), (50_257, 2048))  # vocabulary, width
ROWS = (64, 128, 512, 1024)
DTYPES = (torch.bfloat16, torch.float32)


def cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return (time.process_time() - start) / torch.get_num_threads()


class Operands:
    """Of the products for `rows` rows."""

    def __init__(self, vocab: int, width: int, rows: int, dtype: torch.dtype):
        torch.manual_seed(0)
        self.weight, self.hidden = torch.randn(vocab, width).to(dtype), torch.randn(rows, width).to(dtype)
        self.dz = torch.randn(rows, vocab).to(dtype)
        self.logits, self.total = torch.empty(rows, vocab), torch.zeros(vocab, width)
        self.dhidden, self.dweight = torch.empty_like(self.hidden), torch.zeros_like(self.weight)
        self.torch_logits = torch.empty_like(self.dz)

    def candidates(self) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
        """Ours and torch's, by the name of the product."""
        weight, hidden, dz = self.weight, self.hidden, self.dz
        return {
            "logits": (
                lambda: product(hidden, weight.t(), self.logits),
                lambda: torch.mm(hidden, weight.t(), out=self.torch_logits),
            ),
            "dhidden": (lambda: product(dz, weight, self.dhidden), lambda: torch.mm(dz, weight, out=self.dhidden)),
            "dW": (lambda: product(dz.t(), hidden, self.dweight), lambda: torch.mm(dz.t(), hidden, out=self.dweight)),
            "sum of dW": (
                lambda: product(dz.t(), hidden, self.total, accumulate=True),
                lambda: self.dweight.addmm_(dz.t(), hidden),
            ),
        }


def measured(vocab: int, width: int, rows: int, dtype: torch.dtype, rounds: int) -> dict:
    """Seconds of each product, ours and torch's, and ours over torch's."""
    candidates = Operands(vocab, width, rows, dtype).candidates()
    seconds: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in candidates}
    for _ in range(rounds):
        for name, pair in candidates.items():
            for series, run in zip(seconds[name], pair):
                series.append(cpu_seconds(run))
    least = {name: [min(series) for series in pair] for name, pair in seconds.items()}
    return {
        "vocab": vocab,
        "width": width,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": least,
        "ratios": {name: ours / theirs for name, (ours, theirs) in least.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: list[dict] = []
    for dtype in DTYPES:
        for vocab, width in HEADS:
            for rows in ROWS:
                results.append(measured(vocab, width, rows, dtype, arguments.rounds))
                save("bench_products", {"products": describe_brgemm(), "results": results}, arguments.output)
    shown = [{**result, **result["ratios"]} for result in results]
    print(text_table(shown, ["dtype", "vocab", "width", "rows", *results[0]["ratios"]]))


if __name__ == "__main__":
    main()
