"""Errors of float16 gradients where pairs are well separated, as they are late in a training.

    python benchmarks/bench_float16.py [--pairs 2] [--tokens 200] [--vocab 4096] [--width 256] [--output FOLDER]

The policy's hidden states are the reference's, moved along the rows of the head that belong to the labels, so far that
TDPO2's margin has a given number of nats (beta 0.1: at 120 nats, the slope of the loss is 6e-6). The loss is multiplied
by 65,536 as a GradScaler starts. Relative errors of dhidden and dW against float64 on the same float16 inputs, of
`linear_preference_loss` with whole pairs and a block at a time, and of the published arithmetic on materialised logits.
The results go to bench_float16.json.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import NamedTuple

import torch
from common import RESULTS, save, text_table
from peers import published_linear
from torch import Tensor

from tdpo_ext import eager, linear_preference_loss, tdpo_loss

NATS = (0, 60, 100, 120)
LOSS_SCALE = 65536.0
objective = functools.partial(tdpo_loss, beta=0.1)


class Pairs(NamedTuple):
    """The tensors of `linear_preference_loss`; the reference stands on the policy's head."""

    hidden: Tensor
    weight: Tensor
    ref_hidden: Tensor
    ref_weight: Tensor
    labels: Tensor

    def double(self) -> Pairs:
        return Pairs(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in self))

    def gradients(self, function) -> list[Tensor]:
        """Of hidden and weight, times the loss scale, in float64."""
        leaves = [tensor.clone().requires_grad_() for tensor in self[:2]]
        loss, _, _ = function(objective, *leaves, *self[2:])
        return [grad.double() for grad in torch.autograd.grad(LOSS_SCALE * loss, leaves)]


def margin(pairs: Pairs) -> float:
    """TDPO2's, in nats, the mean over pairs."""
    with torch.no_grad():
        _, chosen, rejected = eager.linear_preference_loss(objective, *pairs.double())
    return (chosen.logratio - rejected.logratio - 0.5 * (rejected.kl - chosen.kl)).mean().item()


def separated_pairs(nats: float, count: int, tokens: int, vocab: int, width: int) -> Pairs:
    """Pairs in float16 whose mean margin is `nats`."""
    torch.manual_seed(0)
    ref_hidden = torch.randn(2 * count, tokens, width)
    weight = torch.randn(vocab, width) / width**0.5
    labels = torch.randint(vocab, (2 * count, tokens))
    noise = 0.05 * torch.randn_like(ref_hidden)
    towards = weight[labels] * torch.tensor([1.0] * count + [-1.0] * count)[:, None, None]

    def moved(by: float) -> Pairs:
        hidden = ref_hidden + noise + by * towards
        return Pairs(*(x.half() for x in (hidden, weight, ref_hidden, weight)), labels)

    low, high = -4.0, 4.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if margin(moved(middle)) < nats else (low, middle)
    return moved((low + high) / 2)


def candidates(pairs: Pairs) -> dict:
    block = 2 * len(pairs.labels[0]) * len(pairs.weight) * 10 // 2  # logits of half a pair
    return {
        "tdpo_ext, whole pairs": linear_preference_loss,
        "tdpo_ext, a block at a time": functools.partial(linear_preference_loss, logits_budget=block),
        "published, with loss scaling": published_linear,
    }


def errors(nats: float, arguments: argparse.Namespace) -> list[dict]:
    pairs = separated_pairs(nats, arguments.pairs, arguments.tokens, arguments.vocab, arguments.width)
    truth = pairs.double().gradients(eager.linear_preference_loss)
    results = []
    for name, function in candidates(pairs).items():
        dhidden, dweight = (
            ((found - exact).norm() / exact.norm()).item() for found, exact in zip(pairs.gradients(function), truth)
        )
        results.append(
            {"nats": nats, "margin": margin(pairs), "candidate": name, "dhidden": dhidden, "dweight": dweight}
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results: list[dict] = []
    for nats in NATS:
        results += errors(nats, arguments)
        sizes = {name: getattr(arguments, name) for name in ("pairs", "tokens", "vocab", "width")}
        save("bench_float16", {**sizes, "loss_scale": LOSS_SCALE, "results": results}, arguments.output)
    print(text_table(results, ["nats", "candidate", "dhidden", "dweight"]))


if __name__ == "__main__":
    main()
