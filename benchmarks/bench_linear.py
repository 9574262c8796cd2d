"""The fused TDPO loss against its matrix products alone and against what else computes it.

    python benchmarks/bench_linear.py [--rounds 3] [--skip-sweep] [--device cuda]

Step: 4 pairs, 1,024 response rows, D 768, V 50,257, float32 and bfloat16 (on a GPU: 1,024 to 16,384 rows, D 4,096,
V 128,256 and 151,936, bfloat16); forward and backward of TDPO2 with gradients for hidden states and weight; every
candidate in turn, in one run. Peers: the published arithmetic behind both heads, eager and compiled; Liger's chunked
linear JSD (two heads, the same arithmetic with uniform cotangents; compiled on a GPU only) and, on a GPU, its fused
linear JSD (KL alone); for scale, with one head and no KL, `F.linear_cross_entropy` and, on a GPU, QuACK's chunked
linear cross entropy. "products": the four matrix products that any exact method needs, by torch.mm in the inputs'
dtype.

Errors: bfloat16 inputs, the reference's hidden states perturbed by 1e-2, against float64 on the same inputs: of the KL,
and of the KL's part of dL/dhidden. Sweep: peak memory over rows and vocabulary, with a plot.
Results go to benchmarks/results/bench_linear.json and bench_linear.png, or bench_linear_cuda.json.
"""

from __future__ import annotations

import argparse
import functools

import torch
import torch.nn.functional as F
from common import RESULTS, medians, peak_extra_bytes, save, table, working
from peers import published, published_linear

from tdpo_ext import linear_preference_loss, linear_token_divergence, reference, tdpo_loss

# (pairs, tokens of a response, width, vocabulary), dtype
STEPS = {
    "cpu": [((4, 128, 768, 50257), torch.float32), ((4, 128, 768, 50257), torch.bfloat16)],
    "cuda": [
        ((rows // 512, 256, 4096, vocab), torch.bfloat16)
        for rows, vocab in ((1024, 128256), (4096, 128256), (16384, 128256), (4096, 151936))
    ],
}
OBJECTIVE = functools.partial(tdpo_loss, beta=0.1)
BUDGET = {"cpu": 256 << 20, "cuda": 1536 << 20}


class Step:
    """Inputs of one training step, and the candidates that compute it."""

    def __init__(self, dtype: torch.dtype, pairs, tokens, width, vocab, perturbation=0.1, device="cpu"):
        self.hidden = torch.randn(2 * pairs, tokens, width, device=device).to(dtype).requires_grad_()
        self.weight = (torch.randn(vocab, width, device=device) / width**0.5).to(dtype).requires_grad_()
        near = self.hidden.detach().float() + perturbation * torch.randn(2 * pairs, tokens, width, device=device)
        self.ref_hidden, self.ref_weight = near.to(dtype), self.weight.detach().clone()
        self.labels = torch.randint(vocab, (2 * pairs, tokens), device=device)
        self.inputs = (self.hidden, self.weight, self.ref_hidden, self.ref_weight, self.labels)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def fused(self, budget: int) -> None:
        linear_preference_loss(OBJECTIVE, *self.inputs, logits_budget=budget)[0].backward()

    def streamed(self, budget: int) -> None:
        divergence = linear_token_divergence(*self.inputs, logits_budget=budget)
        OBJECTIVE(*divergence.per_sequence().chunk(2)).mean().backward()

    def published(self, function) -> None:
        function(OBJECTIVE, *self.inputs)[0].backward()

    def two_heads(self, loss) -> None:
        flat = self.hidden.view(-1, self.hidden.shape[-1]), self.ref_hidden.view(-1, self.ref_hidden.shape[-1])
        loss(flat[0], self.weight, flat[1], self.ref_weight, self.labels.view(-1)).backward()

    def one_head(self, loss) -> None:
        loss(self.hidden.view(-1, self.hidden.shape[-1]), self.weight, self.labels.view(-1)).backward()

    def products(self):
        hidden, ref_hidden = (t.detach().view(-1, t.shape[-1]) for t in (self.hidden, self.ref_hidden))
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
    """What else computes the step, or a part of it, where it is installed."""
    found = {}
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        options = {"weight_hard_loss": 0.5, "weight_soft_loss": 0.5, "beta": 0.0}
        chunked = LigerFusedLinearJSDLoss(compiled=device == "cuda", **options)
        found["liger chunked jsd"] = functools.partial(step.two_heads, chunked)
        if device == "cuda":
            from liger_kernel.transformers import LigerFusedLinearJSD

            found["liger fused jsd"] = functools.partial(step.two_heads, LigerFusedLinearJSD(jsd_beta=0.0))
    except ImportError:
        print("liger-kernel is not installed: that peer is left out")
    if hasattr(F, "linear_cross_entropy"):
        found["linear_cross_entropy (one head)"] = functools.partial(step.one_head, F.linear_cross_entropy)
    if device == "cuda":
        try:
            from quack.linear_cross_entropy import chunked_linear_cross_entropy

            found["quack chunked cross entropy (one head)"] = functools.partial(
                step.one_head, functools.partial(chunked_linear_cross_entropy, chunk_size=4096)
            )
        except ImportError:
            print("quack-kernels is not installed: that peer is left out")
    return found


def compare(shape: tuple[int, ...], dtype: torch.dtype, rounds: int, device: str) -> dict:
    step, budget = Step(dtype, *shape, device=device), BUDGET[device]
    candidates = {
        "tdpo_ext resident": lambda: step.fused(budget),
        "tdpo_ext streaming": lambda: step.streamed(budget),
        "published, eager": lambda: step.published(published_linear),
        "published, compiled": functools.partial(step.published, torch.compile(published_linear)),
        "products": step.products(),
        **peers(step, device),
    }
    candidates = working(candidates)
    seconds = medians(candidates, rounds, prepare=step.clear, device=device)
    gradients = step.hidden.nbytes + step.weight.nbytes
    rows = []
    for name, run in candidates.items():
        step.clear()
        extra = 0 if name == "products" else peak_extra_bytes(run, device) - gradients
        rows.append(
            {
                "candidate": name,
                "seconds": seconds[name],
                "over_products": seconds[name] / seconds["products"],
                "extra_mb": extra / 2**20,
            }
        )
    pairs, tokens, width, vocab = shape
    return {
        "rows": 2 * pairs * tokens,
        "width": width,
        "vocab": vocab,
        "dtype": str(dtype).removeprefix("torch."),
        "budget": budget,
        "candidates": rows,
    }


def near_equality(device: str) -> dict:
    """Relative errors of the KL and of its part of dL/dhidden near p = q, ours and the eager bfloat16 path's."""
    step = Step(torch.bfloat16, pairs=1, tokens=64, width=512, vocab=32000, perturbation=1e-2, device=device)

    def eager(*inputs):
        hidden, weight, ref_hidden, ref_weight, labels = inputs
        return published(F.linear(hidden, weight), F.linear(ref_hidden, ref_weight), labels)

    def kl_and_gradient(function, dtype: torch.dtype):
        tensors = [t.detach().to(dtype) if t.is_floating_point() else t for t in step.inputs]
        leaf = tensors[0].requires_grad_()
        kl = function(*tensors).kl
        return kl.detach().double(), torch.autograd.grad(kl.sum(), leaf)[0].double()

    truth = kl_and_gradient(reference.linear_token_divergence, torch.float64)
    found = {
        "tdpo_ext": kl_and_gradient(linear_token_divergence, torch.bfloat16),
        "eager": kl_and_gradient(eager, torch.bfloat16),
    }
    return {
        name: {"kl": ((kl - truth[0]).norm() / truth[0].norm()).item(),
               "dhidden": ((grad - truth[1]).norm() / truth[1].norm()).item()}
        for name, (kl, grad) in found.items()
    }  # fmt: skip


def sweep() -> list[dict]:
    """Peak memory beyond inputs and gradients, at a budget of 64 MiB."""
    budget, points = 64 << 20, []
    shapes = [(rows, 32000) for rows in (256, 512, 1024, 2048, 4096)]
    shapes += [(512, vocab) for vocab in (8000, 64000, 128000, 256000)]
    for rows, vocab in shapes:
        step = Step(torch.float32, pairs=rows // 128, tokens=64, width=64, vocab=vocab)
        gradients = step.hidden.nbytes + step.weight.nbytes
        for name, run in (("resident or as planned", step.fused), ("streaming", step.streamed)):
            step.clear()
            extra = peak_extra_bytes(functools.partial(run, budget)) - gradients
            points.append({"rows": rows, "vocab": vocab, "plan": name, "extra_mb": extra / 2**20, "budget_mb": 64})
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
    parser.add_argument("--skip-sweep", action="store_true", help="leave out the memory sweep")
    parser.add_argument("--device", choices=STEPS, default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    results: dict = {"steps": []}
    for shape, dtype in STEPS[device]:
        result = compare(shape, dtype, arguments.rounds, device)
        results["steps"].append(result)
        print("\n{dtype}: {rows} rows, D {width}, V {vocab}, budget {budget:,} bytes".format(**result))
        print(table(result["candidates"], list(result["candidates"][0])))
        if device == "cuda":
            torch.cuda.empty_cache()
    results["near_equality"] = near_equality(device)
    print(f"\nnear p = q, relative errors: {results['near_equality']}")
    if device == "cpu" and not arguments.skip_sweep:
        results["sweep"] = sweep()
        print("\n" + table(results["sweep"], list(results["sweep"][0])))
        plot(results["sweep"])
    print(f"saved {save('bench_linear' if device == 'cpu' else 'bench_linear_cuda', results)}")


if __name__ == "__main__":
    main()
