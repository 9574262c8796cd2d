"""The constants of the planner's cost model, measured on this machine: `tdpo_ext/fused/planning/costs.py` states them.

    python benchmarks/bench_rates.py [--repeats 5]

Seconds of every product of the fused loss over n rows are fitted by a + b n, D 512, V 100,000: b gives multiply-adds a
second; a of the products for logits and for dhidden gives bytes of weights a second, and a of the product that is added
to dW gives bytes of sums a second. Seconds are CPU seconds over the number of threads, the least of some repeats, so
that other work on the machine counts little. Results go to benchmarks/results/bench_rates.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import save

from tdpo_ext.ops import memory
from tdpo_ext.ops.matmul import product

VOCAB, WIDTH, ROWS = 100_000, 512, (64, 128, 256, 384)


def cpu_seconds(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):  # the first is a warm-up
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times[1:]) / torch.get_num_threads()


def fit(rows: tuple[int, ...], seconds: list[float]) -> tuple[float, float]:
    """(a, b) of seconds = a + b rows, by least squares."""
    x, y = torch.tensor(rows, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64)
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return float(y.mean() - slope * x.mean()), float(slope)


def measure(dtype: torch.dtype, repeats: int) -> dict:
    device, accumulated = torch.device("cpu"), torch.float32
    weight = (torch.randn(VOCAB, WIDTH) / WIDTH**0.5).to(dtype)
    total = memory.empty((VOCAB, WIDTH), accumulated, device).zero_()
    logits = memory.empty((max(ROWS), VOCAB), accumulated, device)
    dz = memory.empty((max(ROWS), VOCAB), dtype, device).zero_()
    seconds: dict[str, list[float]] = {"logits": [], "dhidden": [], "dW": []}
    for rows in ROWS:
        hidden = torch.randn(rows, WIDTH).to(dtype)
        runs = {
            "logits": lambda hidden=hidden: product(hidden, weight.t(), logits[: len(hidden)]),
            "dhidden": lambda hidden=hidden: product(dz[: len(hidden)], weight, torch.empty_like(hidden)),
            "dW": lambda hidden=hidden: product(dz[: len(hidden)].t(), hidden, total, accumulate=True),
        }
        for name, run in runs.items():
            seconds[name].append(cpu_seconds(run, repeats))
    fits = {name: fit(ROWS, series) for name, series in seconds.items()}
    slopes = [slope for _, slope in fits.values()]
    constants = [fits[name][0] for name in ("logits", "dhidden")]
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "seconds": seconds,
        "products": VOCAB * WIDTH * len(slopes) / sum(slopes),
        "weights": weight.nbytes * len(constants) / sum(constants),
        "memory": 2 * total.nbytes / fits["dW"][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="of every product; the least counts")
    repeats = parser.parse_args().repeats
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        results.append(measure(dtype, repeats))
        print(
            "{dtype}: {products:.3g} multiply-adds, {weights:.3g} and {memory:.3g} bytes a second".format(**results[-1])
        )
    print(f"saved {save('bench_rates', {'vocab': VOCAB, 'width': WIDTH, 'rows': ROWS, 'results': results})}")


if __name__ == "__main__":
    main()
