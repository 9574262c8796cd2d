"""What one binary for every torch costs: products without the optional module, operator calls, import time, wheel size.

    python benchmarks/bench_wheel.py [--against PYTHON] [WHEEL ...]

Run it with a source build, which has the optional module (`python -m tdpo_ext` shows `brgemm`). `--against` is an
interpreter whose tdpo_ext has its operators on torch's C++ interface, as releases before the stable ABI had.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import medians, save, text_table

import tdpo_ext
from tdpo_ext.ops import matmul

ROWS, WIDTH, VOCAB = 512, 768, 50_257
PAIRS = 2
# Microseconds of an operator call on a row so short that only the call costs anything, and seconds of the import.
CALL = """
import json, time, torch
begin = time.perf_counter()
import tdpo_ext
imported = time.perf_counter() - begin
torch.set_num_threads(1)
from tdpo_ext.ops import operators
logits, ref_logits, labels = torch.randn(1, 8), torch.randn(1, 8), torch.tensor([3])
options = operators.RowOptions(vocab_start=0, vocab_size=8)
states, grad = operators.row_states(logits, ref_logits, labels, options), torch.ones(1)
out = torch.empty_like(logits)
calls = {
    "row_states": lambda: operators.row_states(logits, ref_logits, labels, options),
    "logit_gradient_out": lambda: operators.logit_gradient_out(
        logits, ref_logits, labels, states, logps_grad=grad, kl_grad=grad, options=options, out=out
    ),
}
found = {}
for name, call in calls.items():
    for _ in range(2000):
        call()
    begin = time.perf_counter()
    for _ in range(20000):
        call()
    found[name] = (time.perf_counter() - begin) / 20000 * 1e6
print(json.dumps({"import_seconds": imported, "call_microseconds": found}))
"""


@contextlib.contextmanager
def without_brgemm() -> Iterator[None]:
    """As in a wheel, which has no optional module."""
    kept, matmul.has_brgemm = matmul.has_brgemm, lambda dtype: False
    matmul._rounds_faster.cache_clear()
    try:
        yield
    finally:
        matmul.has_brgemm = kept
        matmul._rounds_faster.cache_clear()


def both(call: Callable[[], object]) -> dict[str, Callable[[], object]]:
    def plain() -> None:
        with without_brgemm():
            call()

    return {"with": call, "without": plain}


def products(dtype: torch.dtype, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of the products of a chunk: logits, dhidden and dW."""
    hidden, weight = torch.randn(ROWS, WIDTH).to(dtype), torch.randn(VOCAB, WIDTH).to(dtype)
    gradient = torch.randn(ROWS, VOCAB).to(dtype)
    logits, dhidden = torch.empty(ROWS, VOCAB), torch.zeros(ROWS, WIDTH)
    dweight = torch.empty(VOCAB, WIDTH, dtype=dtype)
    calls = {
        "logits": lambda: matmul.product(hidden, weight.t(), logits),
        "dhidden": lambda: matmul.product(gradient, weight, dhidden),
        "dW": lambda: matmul.product(gradient.t(), hidden, dweight),
    }
    found = {}
    for name, call in calls.items():
        seconds = medians(both(call), rounds)
        found[name] = {key: 1e3 * value for key, value in seconds.items()}
    return found


def step(dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Milliseconds of a whole loss with its gradients, from hidden states."""
    hidden = (torch.randn(2 * PAIRS, ROWS // (2 * PAIRS), WIDTH) / WIDTH**0.5).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, WIDTH).to(dtype).requires_grad_()
    ref_hidden, ref_weight = (hidden * 1.01).detach(), weight.detach().clone()
    labels = torch.randint(VOCAB, hidden.shape[:2])
    loss = tdpo_ext.LinearTDPOLoss()

    def run() -> None:
        loss(hidden, weight, ref_hidden, ref_weight, labels)[0].backward()
        hidden.grad = weight.grad = None

    return {key: 1e3 * value for key, value in medians(both(run), rounds).items()}


def calls(interpreters: dict[str, str], rounds: int) -> dict[str, dict]:
    """Import time and the cost of operator calls, in fresh processes that alternate."""
    series: dict[str, list[dict]] = {name: [] for name in interpreters}
    with tempfile.TemporaryDirectory() as folder:  # not the source tree
        for _ in range(rounds):
            for name, python in interpreters.items():
                said = subprocess.run([python, "-c", CALL], check=True, capture_output=True, text=True, cwd=folder)
                series[name].append(json.loads(said.stdout))
    return {name: _median_of(found) for name, found in series.items()}


def _median_of(found: list[dict]) -> dict:
    names = found[0]["call_microseconds"]
    return {
        "import_seconds": statistics.median(one["import_seconds"] for one in found),
        "call_microseconds": {
            name: statistics.median(one["call_microseconds"][name] for one in found) for name in names
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", metavar="PYTHON", help="an interpreter with a build of an earlier release")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("wheels", type=Path, nargs="*")
    arguments = parser.parse_args()
    if not matmul.has_brgemm(torch.bfloat16):
        raise SystemExit(f"the optional module multiplies no bfloat16 here: {matmul.describe_brgemm()}")
    torch.manual_seed(0)
    report: dict = {
        "shape": {"rows": ROWS, "width": WIDTH, "vocab": VOCAB},
        "wheel_bytes": {path.name: path.stat().st_size for path in arguments.wheels},
        "products": {},
        "step": {},
    }
    interpreters = {"stable ABI": sys.executable}
    if arguments.against:
        interpreters["C++ interface"] = arguments.against
    report["processes"] = calls(interpreters, arguments.rounds)
    print(report["processes"])
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        report["products"][name] = products(dtype, arguments.rounds)
        report["step"][name] = step(dtype, arguments.rounds)
        rows = [{"what": what, **times} for what, times in report["products"][name].items()]
        print(name, "ms")
        print(text_table([*rows, {"what": "whole step", **report["step"][name]}], ["what", "with", "without"]))
        save("bench_wheel", report)


if __name__ == "__main__":
    main()
