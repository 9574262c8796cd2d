"""The fused TDPO loss against its matrix products alone and against other implementations of it.

    python benchmarks/bench_linear.py [--rounds 3] [--skip-sweep] [--device cuda] [--tiny] [--output FOLDER]

Step: 4 pairs, 1,024 response rows, D 768, V 50,257, float32 and bfloat16 (on a GPU: 4,096 and 8,192 rows, D 4,096,
V 128,256, bfloat16, the default budget); forward and backward of TDPO2 with gradients of hidden states and weight; the
candidates alternate in one run. Peers: the published arithmetic behind both heads, eager and compiled; TRL's streamed
divergence and log-probabilities, composed to the same loss (Triton kernels on a GPU); Liger's chunked
linear JSD (two heads, the same arithmetic with uniform upstream gradients; compiled on a GPU only) and, on a GPU, its
fused linear JSD (KL alone); for scale, with one head and no KL, `F.linear_cross_entropy` and, on a GPU, QuACK's chunked
linear cross entropy. "torch kernels": tdpo_ext with its kernels in plain torch, as on a device without compiled ones.
"products": the four matrix products that any exact method needs, by torch.mm in the inputs' dtype. "packed": rows
without padding whose lengths are known, for which the host never waits.

Sweep: peak memory over rows and vocabulary, with a plot. bench_precision.py measures errors.
On a GPU, every shape is first measured without peers, whose compilation takes most of the time, and then with them.
Results go to benchmarks/results/bench_linear.json and bench_linear.png, or bench_linear_cuda.json, after every case.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, cuda_peaks, medians, peak_extra_bytes, runnable, save, text_table, with_torch_kernels
from peers import published_linear, trl_linear
from planned import step_plan, step_sizes

from tdpo_ext import linear_preference_loss, linear_token_divergence, tdpo_loss
from tdpo_ext.fused.planning.plan import ChunkedPlan, StreamingPlan, resolved_budget


class Shape(NamedTuple):
    pairs: int
    tokens: int  # a response
    width: int
    vocab: int

    @property
    def rows(self) -> int:
        return 2 * self.pairs * self.tokens


STEPS = {
    "cpu": [(Shape(4, 128, 768, 50257), dtype) for dtype in (torch.float32, torch.bfloat16)],
    "cuda": [
        (Shape(pairs, 512, 4096, 128256), torch.bfloat16)
        for pairs in (4, 8)  # gpu_facts.py has other shapes, without peers
    ],
}
TINY = [(Shape(1, 6, 16, 301), dtype) for dtype in (torch.float32, torch.bfloat16)]  # to rehearse the script
OBJECTIVE = functools.partial(tdpo_loss, beta=0.1)
BUDGET = {"cpu": 256 << 20, "cuda": None}  # None: the default


class Step:
    """Inputs of one training step, and the candidates that compute it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str = "cpu"):
        self.shape = shape
        rows = (2 * shape.pairs, shape.tokens)
        self.hidden = torch.randn(*rows, shape.width, device=device).to(dtype).requires_grad_()
        self.weight = (torch.randn(shape.vocab, shape.width, device=device) / shape.width**0.5).to(dtype)
        self.weight.requires_grad_()
        noise = 0.1 * torch.randn(*rows, shape.width, device=device)
        self.ref_hidden = (self.hidden.detach().float() + noise).to(dtype)
        self.ref_weight = self.weight.detach().clone()
        self.labels = torch.randint(shape.vocab, rows, device=device)
        self.inputs = {
            "hidden": self.hidden,
            "weight": self.weight,
            "ref_hidden": self.ref_hidden,
            "ref_weight": self.ref_weight,
            "labels": self.labels,
        }
        sequences = 2 * shape.pairs
        self.packed_inputs = {
            **self.inputs,
            **{name: self.inputs[name].flatten(0, 1) for name in ("hidden", "ref_hidden", "labels")},
            "row_lengths": [shape.tokens] * sequences,
            "cu_seqlens": shape.tokens * torch.arange(sequences + 1, device=device),
        }

    @property
    def gradient_bytes(self) -> int:
        return self.hidden.nbytes + self.weight.nbytes

    def plan(self, budget: int | None) -> ChunkedPlan | StreamingPlan:
        """What `fused` and `packed` take; with the default budget for None."""
        sizes = step_sizes(self.shape.vocab, self.shape.width, self.weight.dtype)
        used, device = resolved_budget(budget, self.weight.device), self.weight.device.type
        return step_plan(self.shape.pairs, 2 * self.shape.tokens, sizes, used, device)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def fused(self, budget: int | None) -> None:
        loss, _, _ = linear_preference_loss(OBJECTIVE, **self.inputs, logits_budget=budget)
        loss.backward()

    def packed(self, budget: int | None) -> None:
        loss, _, _ = linear_preference_loss(OBJECTIVE, **self.packed_inputs, logits_budget=budget)
        loss.backward()

    def streamed(self, budget: int | None) -> None:
        divergence = linear_token_divergence(**self.inputs, logits_budget=budget)
        chosen, rejected = divergence.per_sequence().chunk(2)
        OBJECTIVE(chosen, rejected).mean().backward()

    def published(self, function) -> None:
        loss, _, _ = function(OBJECTIVE, **self.inputs)
        loss.backward()

    def two_heads(self, loss) -> None:
        hidden, ref_hidden = self.hidden.flatten(0, 1), self.ref_hidden.flatten(0, 1)
        loss(hidden, self.weight, ref_hidden, self.ref_weight, self.labels.view(-1)).backward()

    def trl(self) -> None:
        """TDPO2 from TRL's streamed kernels."""
        OBJECTIVE(*trl_linear(**self.inputs).per_sequence().chunk(2)).mean().backward()

    def one_head(self, loss) -> None:
        loss(self.hidden.flatten(0, 1), self.weight, self.labels.view(-1)).backward()

    def products(self):
        hidden, ref_hidden = self.hidden.detach().flatten(0, 1), self.ref_hidden.flatten(0, 1)
        weight = self.weight.detach()
        dz = torch.randn(len(hidden), len(weight), dtype=hidden.dtype, device=hidden.device)
        logits, dw = torch.empty_like(dz), torch.empty_like(weight)

        def run() -> None:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(ref_hidden, self.ref_weight.t(), out=logits)
            torch.mm(dz, weight)
            torch.mm(dz.t(), hidden, out=dw)

        return run


def peers(step: Step, device: str) -> dict:
    """The installed peers that compute the step, or a part of it; and tdpo_ext without its compiled kernels."""
    fused, streamed = (functools.partial(function, BUDGET[device]) for function in (step.fused, step.streamed))
    candidates = {
        "torch kernels, chunked": with_torch_kernels(fused, device),
        "torch kernels, streaming": with_torch_kernels(streamed, device),
        "published, eager": lambda: step.published(published_linear),
        "published, compiled": functools.partial(step.published, torch.compile(published_linear)),
    }
    if find_spec("trl") is not None:
        candidates["trl divergence and log-probabilities"] = step.trl
    else:
        print("trl is not installed: that peer is skipped")
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        options = {"weight_hard_loss": 0.5, "weight_soft_loss": 0.5, "beta": 0.0}
        chunked = LigerFusedLinearJSDLoss(compiled=device == "cuda", **options)
        candidates["liger chunked jsd"] = functools.partial(step.two_heads, chunked)
        if device == "cuda":
            from liger_kernel.transformers import LigerFusedLinearJSD

            candidates["liger fused jsd"] = functools.partial(step.two_heads, LigerFusedLinearJSD(jsd_beta=0.0))
    except ImportError:
        print("liger-kernel is not installed: that peer is skipped")
    if hasattr(F, "linear_cross_entropy"):
        candidates["linear_cross_entropy (one head)"] = functools.partial(step.one_head, F.linear_cross_entropy)
    if device == "cuda":
        try:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy

            candidates["quack chunked cross entropy (one head)"] = functools.partial(
                step.one_head, functools.partial(chunked_linear_cross_entropy, chunk_size=4096)
            )
        except ImportError:
            print("quack-kernels is not installed: that peer is skipped")
    return candidates


def extra_memory(step: Step, run: Callable[[], object], device: str) -> dict[str, float]:
    """Peak MiB of a candidate beyond inputs and gradients; on a GPU those that the allocator reserves, too."""
    step.clear()
    if device == "cpu":
        peaks = {"extra_mb": peak_extra_bytes(run)}
    else:
        allocated, reserved = cuda_peaks(run)
        peaks = {"extra_mb": allocated, "reserved_mb": reserved}
    return {name: (peak - step.gradient_bytes) / 2**20 for name, peak in peaks.items()}


def compare(shape: Shape, dtype: torch.dtype, rounds: int, device: str, with_peers: bool = True) -> dict:
    """One case: the plan, and what each candidate takes."""
    step, budget = Step(shape, dtype, device=device), BUDGET[device]
    plan = step.plan(budget)
    candidates = {
        "tdpo_ext chunked": lambda: step.fused(budget),
        "tdpo_ext packed": lambda: step.packed(budget),
        "tdpo_ext streaming": lambda: step.streamed(budget),
        "products": step.products(),
        **(peers(step, device) if with_peers else {}),
    }
    candidates = runnable(candidates)
    seconds = medians(candidates, rounds, prepare=step.clear, device=device)
    rows = []
    for name, run in candidates.items():
        row = {"candidate": name, "seconds": seconds[name], "over_products": seconds[name] / seconds["products"]}
        rows.append(row if name == "products" else {**row, **extra_memory(step, run, device)})
    return {
        "rows": shape.rows,
        "width": shape.width,
        "vocab": shape.vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "budget": plan.budget,
        "plan": str(plan),
        "candidates": rows,
    }


def sweep() -> list[dict]:
    """Peak memory beyond inputs and gradients, at a budget of 64 MiB."""
    budget, points = 64 << 20, []
    shapes = [(rows, 32000) for rows in (256, 512, 1024, 2048, 4096)]
    shapes += [(512, vocab) for vocab in (8000, 64000, 128000, 256000)]
    for rows, vocab in shapes:
        step = Step(Shape(pairs=rows // 128, tokens=64, width=64, vocab=vocab), torch.float32)
        for plan, run in (("the planner's choice", step.fused), ("streaming", step.streamed)):
            step.clear()
            extra = peak_extra_bytes(functools.partial(run, budget)) - step.gradient_bytes
            points.append({"rows": rows, "vocab": vocab, "plan": plan, "extra_mb": extra / 2**20, "budget_mb": 64})
    return points


def plot(points: list[dict]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained", sharey=True)
    for axes, key, fixed in ((left, "rows", ("vocab", 32000)), (right, "vocab", ("rows", 512))):
        for name in dict.fromkeys(point["plan"] for point in points):
            chosen = sorted((p for p in points if p["plan"] == name and p[fixed[0]] == fixed[1]), key=lambda p: p[key])
            axes.plot([p[key] for p in chosen], [p["extra_mb"] for p in chosen], marker="o", label=name)
            logits = [2 * p["rows"] * p["vocab"] * 4 / 2**20 for p in chosen]
        axes.plot([p[key] for p in chosen], logits, "--", color="gray", label="both logits, float32")
        axes.axhline(64, color="black", lw=0.5)
        axes.set(xlabel=f"{key} ({fixed[0]} {fixed[1]:,})", yscale="log")
        axes.grid(alpha=0.3)
    left.set_ylabel("peak MiB beyond inputs and gradients")
    left.legend(fontsize=8)
    figure.savefig(RESULTS / "bench_linear.png", dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported")
    parser.add_argument("--skip-sweep", action="store_true", help="skip the memory sweep")
    parser.add_argument("--device", choices=STEPS, default="cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: rehearses the script, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    device, cases = arguments.device, TINY if arguments.tiny else STEPS[arguments.device]
    torch.manual_seed(0)
    name = "bench_linear" if device == "cpu" else "bench_linear_cuda"
    steps: dict[tuple, dict] = {}
    results: dict = {}
    for with_peers in (False, True) if device == "cuda" or arguments.tiny else (True,):
        for case in cases:
            steps[case] = result = compare(*case, arguments.rounds, device, with_peers)
            results["steps"] = list(steps.values())
            save(name, results, arguments.output)
            print("\n{dtype}: {rows} rows, D {width}, V {vocab}, budget {budget:,} bytes\n{plan}".format(**result))
            print(text_table(result["candidates"], list(result["candidates"][0])))
            if device == "cuda":
                torch.cuda.empty_cache()
    if device == "cpu" and not arguments.skip_sweep:
        results["sweep"] = sweep()
        print("\n" + text_table(results["sweep"], list(results["sweep"][0])))
        plot(results["sweep"])
    print(f"saved {save(name, results, arguments.output)}")


if __name__ == "__main__":
    main()
