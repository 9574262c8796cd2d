"""Logit-level forward and backward against eager torch, torch.compile and a copy of the same memory.

    python benchmarks/bench_logits.py [--rounds 7] [--device cuda] [--tiny] [--output FOLDER]

Every candidate computes the values and the gradient of the same loss on the same logits; the candidates alternate in
one run. "published" is what the published TDPO code computes (no entropy, no masks, no edge values); "oracle" is
`tdpo_ext.eager`, which defines the values and edge cases of tdpo_ext. Each runs eagerly and through torch.compile.
"torch kernels" is tdpo_ext with its kernels in plain torch, as on a device without compiled ones.

Bandwidths count the bytes that must move: both logits in the forward pass, both logits and the gradient in the backward
pass; for the copy, which is the upper bound, the bytes read and the bytes written. On a GPU, QuACK's cross entropy (one
row of logits, no KL) is included if it is installed. On a GPU, every shape is first measured without peers, whose
compilation takes most of the time, and then with them. Results go to benchmarks/results/bench_logits.json, or
bench_logits_cuda.json, after every case.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import torch
from common import RESULTS, medians, peak_extra_bytes, runnable, save, text_table, with_torch_kernels
from peers import published
from row_kernels import RowKernels

from tdpo_ext import eager, token_divergence
from tdpo_ext.ops import operators

DTYPES = (torch.float32, torch.bfloat16)
CASES = {
    "cpu": [(rows, vocab, dtype) for rows, vocab in ((512, 50257), (128, 151936)) for dtype in DTYPES],
    "cuda": [(4096, 128256, dtype) for dtype in reversed(DTYPES)],  # gpu_facts.py has others, without peers
}
TINY = [(6, 300, torch.float32), (3, 5000, torch.bfloat16)]  # to rehearse the script
TORCH_KERNELS = "torch kernels"


def is_peer(name: str) -> bool:
    return any(word in name for word in ("eager", "compiled", "quack", TORCH_KERNELS))


def candidates(rows: int, vocab: int, dtype: torch.dtype, device: str):
    """Forward + backward of ours and of every peer, our two passes alone, and the copy; and the logits they read."""
    logits = torch.randn(rows, vocab, device=device).mul_(2).to(dtype).requires_grad_()
    ref_logits = (logits.detach() + 0.3 * torch.randn(rows, vocab, device=device, dtype=dtype)).to(dtype)
    labels = torch.randint(vocab, (rows,), device=device)

    def step(function):
        def run():
            divergence = function(logits, ref_logits, labels)
            (divergence.logps.sum() - 0.3 * divergence.kl.sum()).backward()

        return run

    kernels = RowKernels(logits.detach(), ref_logits, labels, torch.empty_like(ref_logits))
    gradients = kernels.gradients(-0.3)
    runs = {
        "tdpo_ext": step(token_divergence),
        TORCH_KERNELS: with_torch_kernels(step(token_divergence), device),
        "tdpo_ext, reverse KL": step(functools.partial(token_divergence, kl_direction="reverse")),
        "published, eager": step(published),
        "published, compiled": step(torch.compile(published)),
        "oracle, eager": step(eager.token_divergence),
        "oracle, compiled": step(torch.compile(eager.token_divergence)),
        "forward": kernels.forward,
        "backward": lambda: operators.logit_gradient(**gradients),
        "backward in place": kernels.backward(-0.3),
        "copy": lambda: kernels.target.copy_(ref_logits),
    }
    if device == "cuda":
        try:
            from quack import cross_entropy

            runs["quack cross entropy, one row"] = lambda: cross_entropy(logits, labels).sum().backward()
        except ImportError:
            print("quack-kernels is not installed: that peer is skipped")
    return runs, logits


def measure(rows: int, vocab: int, dtype: torch.dtype, rounds: int, device: str = "cpu", with_peers=True) -> dict:
    runs, leaf = candidates(rows, vocab, dtype, device)
    runs = runnable({name: run for name, run in runs.items() if with_peers or not is_peer(name)})
    size = leaf.nbytes
    seconds = medians(runs, rounds, prepare=lambda: setattr(leaf, "grad", None), device=device)
    copy_rate = 2 * size / seconds["copy"]
    ours = seconds["tdpo_ext"]
    moved = {"tdpo_ext": 5, "tdpo_ext, reverse KL": 5, "forward": 2, "backward": 3, "backward in place": 3}
    peers = [name for name in seconds if is_peer(name)]
    memory = {}
    for name in ("tdpo_ext", *peers):
        leaf.grad = None
        memory[name] = peak_extra_bytes(runs[name], device) / size
    return {
        "rows": rows,
        "vocab": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "milliseconds": {name: 1e3 * value for name, value in seconds.items()},
        "faster_than": {name: seconds[name] / ours for name in peers},
        "copy_gb_per_s": copy_rate / 1e9,
        "of_copy_bandwidth": {name: count * size / seconds[name] / copy_rate for name, count in moved.items()},
        "peak_memory_in_gradients": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; medians are reported")
    parser.add_argument("--device", choices=CASES, default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: rehearses the script, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    device, cases = arguments.device, TINY if arguments.tiny else CASES[arguments.device]
    name = "bench_logits" if device == "cpu" else "bench_logits_cuda"
    results: dict[tuple, dict] = {}
    for with_peers in (False, True) if device == "cuda" or arguments.tiny else (True,):
        for case in cases:
            results[case] = measure(*case, arguments.rounds, device, with_peers)
            path = save(name, {"results": list(results.values())}, arguments.output)
    print_table(list(results.values()))
    print(f"saved {path}")


def print_table(results: list[dict]) -> None:
    rows = [
        {
            **{name: result[name] for name in ("rows", "vocab", "dtype")},
            "ms": result["milliseconds"]["tdpo_ext"],
            **{f"x {name}": ratio for name, ratio in result["faster_than"].items()},
            "of copy": result["of_copy_bandwidth"]["tdpo_ext"],
            "reverse": result["of_copy_bandwidth"]["tdpo_ext, reverse KL"],
            "fwd": result["of_copy_bandwidth"]["forward"],
            "bwd": result["of_copy_bandwidth"]["backward"],
            "memory": result["peak_memory_in_gradients"]["tdpo_ext"],
            "torch kernels' memory": result["peak_memory_in_gradients"].get(TORCH_KERNELS, float("nan")),
            "published memory": result["peak_memory_in_gradients"].get("published, eager", float("nan")),
        }
        for result in results
    ]
    print(text_table(rows, list(max(rows, key=len))))
    print("of copy, reverse (KL), fwd, bwd: share of the copy's bandwidth")
    print("memory: peak extra bytes, in sizes of the gradient")


if __name__ == "__main__":
    main()
