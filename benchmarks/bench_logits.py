"""Logit-level forward and backward against eager torch, torch.compile and a copy of the same memory.

    python benchmarks/bench_logits.py [--rounds 7] [--device cuda]

Every candidate computes the values and the gradient of the same loss on the same logits; all are timed in turn in one
run. "published" is what the published TDPO code computes (no entropy, no masks, no edge values); "oracle" is
`tdpo_ext.reference`, whose contract is ours. Each is run eagerly and through torch.compile.

GB/s count what must move: both logits forward, both logits and the gradient backward. The copy, which is the limit,
counts what it reads and what it writes. On a GPU, QuACK's cross entropy (one row of logits, no KL) stands beside, where
it is installed. Results go to benchmarks/results/bench_logits.json, or bench_logits_cuda.json.
"""

from __future__ import annotations

import argparse

import torch
from common import medians, peak_extra_bytes, save, table, working
from peers import published

from tdpo_ext import ops, reference, token_divergence

SHAPES = {
    "cpu": [(512, 50257), (128, 151936)],
    "cuda": [(4096, 128256), (4096, 151936), (32, 151936), (1 << 20, 32)],  # the usual, few rows, short rows
}


def candidates(rows: int, vocab: int, dtype: torch.dtype, device: str):
    """Forward + backward of every peer, our halves alone, and the copy."""
    logits = torch.randn(rows, vocab, device=device).mul_(2).to(dtype).requires_grad_()
    ref_logits = (logits.detach() + 0.3 * torch.randn(rows, vocab, device=device, dtype=dtype)).to(dtype)
    labels = torch.randint(vocab, (rows,), device=device)

    def step(function):
        def run():
            divergence = function(logits, ref_logits, labels)
            (divergence.logps.sum() - 0.3 * divergence.kl.sum()).backward()

        return run

    plain, target = logits.detach(), torch.empty_like(ref_logits)
    options = (0, vocab, -100, 1.0, 0.0)
    states = ops.row_states(plain, ref_logits, labels, *options)
    upstream = (torch.ones(rows, device=device), torch.full((rows,), -0.3, device=device))
    runs = {
        "tdpo_ext": step(token_divergence),
        "published, eager": step(published),
        "published, compiled": step(torch.compile(published)),
        "oracle, eager": step(reference.token_divergence),
        "oracle, compiled": step(torch.compile(reference.token_divergence)),
        "forward": lambda: ops.row_states(plain, ref_logits, labels, *options),
        "backward": lambda: ops.logit_gradient(plain, ref_logits, labels, states, *upstream, *options),
        "backward in place": lambda: ops.logit_gradient_out(
            plain, ref_logits, labels, states, *upstream, *options, target
        ),
        "copy": lambda: target.copy_(ref_logits),
    }
    if device == "cuda":
        try:
            from quack import cross_entropy

            runs["quack cross entropy, one row"] = lambda: cross_entropy(logits, labels).sum().backward()
        except ImportError:
            print("quack-kernels is not installed: that peer is left out")
    return runs, logits


def measure(rows: int, vocab: int, dtype: torch.dtype, rounds: int, device: str = "cpu") -> dict:
    runs, leaf = candidates(rows, vocab, dtype, device)
    runs = working(runs)
    size = leaf.nbytes
    seconds = medians(runs, rounds, prepare=lambda: setattr(leaf, "grad", None), device=device)
    copy_rate = 2 * size / seconds["copy"]
    ours = seconds["tdpo_ext"]
    moved = {"tdpo_ext": 5, "forward": 2, "backward": 3, "backward in place": 3}
    peers = [name for name in seconds if "eager" in name or "compiled" in name or "quack" in name]
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
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    dtypes = (torch.float32, torch.bfloat16)
    results = [measure(*shape, dtype, arguments.rounds, device) for shape in SHAPES[device] for dtype in dtypes]
    rows = [
        {
            **{name: result[name] for name in ("rows", "vocab", "dtype")},
            "ms": result["milliseconds"]["tdpo_ext"],
            **{f"x {name}": ratio for name, ratio in result["faster_than"].items()},
            "of copy": result["of_copy_bandwidth"]["tdpo_ext"],
            "fwd": result["of_copy_bandwidth"]["forward"],
            "bwd": result["of_copy_bandwidth"]["backward"],
            "memory": result["peak_memory_in_gradients"]["tdpo_ext"],
            "published memory": result["peak_memory_in_gradients"].get("published, eager", float("nan")),
        }
        for result in results
    ]
    print(table(rows, list(max(rows, key=len))))
    print("of copy, fwd, bwd: share of the copy's bandwidth; memory: peak extra bytes, in sizes of the gradient")
    name = "bench_logits" if device == "cpu" else "bench_logits_cuda"
    print(f"saved {save(name, {'results': results})}")


if __name__ == "__main__":
    main()
