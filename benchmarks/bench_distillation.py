"""Exact on-policy distillation, KL(student || teacher) over the whole vocabulary, from hidden states.

    python benchmarks/bench_distillation.py [--device cuda]

One step (loss and its gradients) by `linear_token_loss` and its peers: `linear_token_divergence`, which recomputes
logits in backward; TRL's streamed divergence; Liger's chunked JSD with its reverse KL; plain torch. Of each, time
beside the four products that any exact method needs, memory beyond inputs and gradients, and the multiply-adds that
it takes, in units of rows x width x vocabulary, counted in the products that torch runs (of Triton's and compiled
kernels nothing is seen). Shapes: GPT-2's, and Gemma 3's vocabulary at the width of its smallest model.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from common import RESULTS, medians, peak_extra_bytes, runnable, save, text_table
from torch.utils._python_dispatch import TorchDispatchMode

from tdpo_ext import MarginLoss, linear_token_divergence, linear_token_loss, per_token


class Shape(NamedTuple):
    sequences: int
    tokens: int
    width: int
    vocab: int
    budget: int | None  # of bytes; None: the default

    @property
    def rows(self) -> int:
        return self.sequences * self.tokens


SHAPES = {
    "cpu": [Shape(4, 256, 768, 50_257, 128 << 20), Shape(2, 256, 640, 262_144, 256 << 20)],
    "cuda": [Shape(8, 512, 4096, 128_256, None), Shape(8, 512, 2560, 262_144, None)],
}
TINY = [Shape(2, 6, 16, 301, 1 << 20)]  # to rehearse the script


@per_token
def mean_kl(rows):
    return rows.mean(rows.kl)


DISTILLATION = MarginLoss(mean_kl, lambda mean: mean)


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.multiply_adds = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if name in ("mm", "addmm", "addmm_", "matmul_float32"):
            a, b = args[1:3] if name.startswith("addmm") else args[:2]
            self.multiply_adds += a.shape[0] * a.shape[1] * b.shape[1]
        return function(*args, **(kwargs or {}))


class Step:
    """Inputs of one step, and the candidates that compute it."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str):
        self.shape = shape
        rows = (shape.sequences, shape.tokens)
        self.hidden = torch.randn(*rows, shape.width, device=device).to(dtype).requires_grad_()
        self.weight = (torch.randn(shape.vocab, shape.width, device=device) / shape.width**0.5).to(dtype)
        self.weight.requires_grad_()
        noise = 0.1 * torch.randn(*rows, shape.width, device=device)
        self.teacher_hidden = (self.hidden.detach().float() + noise).to(dtype)
        self.teacher_weight = self.weight.detach().clone()
        self.labels = torch.randint(shape.vocab, rows, device=device)
        self.inputs = (self.hidden, self.weight, self.teacher_hidden, self.teacher_weight, self.labels)
        self.options = {"kl_direction": "reverse", "logits_budget": shape.budget}

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None

    def fused(self) -> None:
        linear_token_loss(DISTILLATION, *self.inputs, **self.options)[0].backward()

    def recomputed(self) -> None:
        linear_token_divergence(*self.inputs, **self.options).kl.mean().backward()

    def plain(self) -> None:
        """In float32, everything materialised."""
        log_p = F.linear(self.hidden, self.weight).float().log_softmax(-1)
        log_q = F.linear(self.teacher_hidden, self.teacher_weight).float().log_softmax(-1)
        (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()

    def trl(self) -> None:
        from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

        heads = (self.hidden.flatten(0, 1), self.weight, None)
        teacher = (self.teacher_hidden.flatten(0, 1), self.teacher_weight, None)
        kl, _ = ChunkedDivergenceFunction.apply(*heads, *teacher, 1.0, 1.0, 1.0, None, 1.0, None)  # 1.0: the reverse KL
        kl.mean().backward()

    def liger(self) -> None:
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        options = {"weight_hard_loss": 0.0, "weight_soft_loss": 1.0, "beta": 1.0, "compiled": self.hidden.is_cuda}
        loss = LigerFusedLinearJSDLoss(**options)
        rows = (self.hidden.flatten(0, 1), self.weight, self.teacher_hidden.flatten(0, 1), self.teacher_weight)
        loss(*rows, self.labels.flatten()).backward()

    def products(self) -> None:
        hidden, teacher_hidden = self.hidden.detach().flatten(0, 1), self.teacher_hidden.flatten(0, 1)
        weight = self.weight.detach()
        logits = torch.mm(hidden, weight.t())
        torch.mm(teacher_hidden, self.teacher_weight.t(), out=logits)
        torch.mm(logits, weight)
        torch.mm(logits.t(), hidden)


def compare(shape: Shape, dtype: torch.dtype, rounds: int, device: str) -> dict:
    """One case: what each candidate takes."""
    step = Step(shape, dtype, device)
    candidates = runnable(
        {
            "linear_token_loss": step.fused,
            "linear_token_divergence": step.recomputed,
            "trl divergence": step.trl,
            "liger chunked jsd": step.liger,
            "plain torch": step.plain,
            "products": step.products,
        }
    )
    seconds = medians(candidates, rounds, prepare=step.clear, device=device)
    rows, gradients = [], step.hidden.nbytes + step.weight.nbytes
    for name, run in candidates.items():
        step.clear()
        with Products() as counted:
            run()
        row = {
            "candidate": name,
            "seconds": seconds[name],
            "over_products": seconds[name] / seconds["products"],
            "multiply_adds": counted.multiply_adds / (shape.rows * shape.width * shape.vocab),
        }
        if name != "products":
            step.clear()
            row["extra_mb"] = (peak_extra_bytes(run, device) - gradients) / 2**20
        rows.append(row)
    return {**shape._asdict(), "dtype": str(dtype).removeprefix("torch."), "candidates": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; medians are reported")
    parser.add_argument("--device", choices=SHAPES, default="cpu")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape: rehearses the script, measures nothing")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    device = arguments.device
    torch.manual_seed(0)
    results: list[dict] = []
    name = "bench_distillation" if device == "cpu" else "bench_distillation_cuda"
    for shape in TINY if arguments.tiny else SHAPES[device]:
        for dtype in (torch.float32, torch.bfloat16):
            results.append(compare(shape, dtype, arguments.rounds, device))
            path = save(name, {"steps": results}, arguments.output)
            print("\n{dtype}: {sequences} x {tokens} rows, D {width}, V {vocab}".format(**results[-1]))
            print(text_table(results[-1]["candidates"], list(results[-1]["candidates"][0])))
    print(f"saved {path}")


if __name__ == "__main__":
    main()
