"""Cases for the fused losses, and their gradients by name."""

import functools
from dataclasses import dataclass, replace

import torch

from tdpo_ext import dpo_loss, tdpo_loss
from tdpo_ext.fused.planning.plan import StreamingPlan


def ipo_loss(chosen, rejected):
    return (chosen.logratio - rejected.logratio - 2.0) ** 2


OBJECTIVES = {
    "dpo": functools.partial(dpo_loss, beta=0.1),
    "tdpo1": functools.partial(tdpo_loss, beta=0.1, variant="tdpo1"),
    "tdpo2": functools.partial(tdpo_loss, beta=0.1, alpha=0.5),
    "ipo": ipo_loss,
}


def not_a_margin_loss(chosen, rejected):
    """TDPO2 as an ordinary objective: pairs that do not fit the budget are streamed, not deferred."""
    return tdpo_loss(chosen, rejected, beta=0.1, alpha=0.5)


@dataclass
class Case:
    hidden: torch.Tensor
    weight: torch.Tensor
    ref_hidden: torch.Tensor
    ref_weight: torch.Tensor
    labels: torch.Tensor
    bias: torch.Tensor | None
    ref_bias: torch.Tensor | None

    def tensors(self, dtype=None):
        """Arguments by name; policy tensors as fresh leaves."""
        found = {}
        for name, value in vars(self).items():
            if value is not None and value.is_floating_point():
                value = value.to(dtype or value.dtype).clone()
                value.requires_grad_(not name.startswith("ref_"))
            found[name] = value
        return found

    def of_columns(self, columns):
        """The same with a part of the vocabulary, as one rank of a shard has it."""
        parts = {n: t[columns] for n, t in vars(self).items() if n.endswith(("weight", "bias")) and t is not None}
        return replace(self, **parts)


def make_case(dtype=torch.float32, pairs=3, tokens=11, width=16, ref_width=24, vocab=301, bias=False, ignored=0.3):
    def draw(*shape, scale=1.0):
        return (scale * torch.randn(*shape)).to(dtype)

    labels = torch.randint(vocab, (2 * pairs, tokens))
    labels[torch.rand(2 * pairs, tokens) < ignored] = -100
    return Case(
        draw(2 * pairs, tokens, width),
        draw(vocab, width, scale=width**-0.5),
        draw(2 * pairs, tokens, ref_width),
        draw(vocab, ref_width, scale=ref_width**-0.5),
        labels,
        draw(vocab) if bias else None,
        draw(vocab) if bias else None,
    )


def loss_and_gradients(function, case, objective, dtype=None, scale=3.0, **options):
    tensors = case.tensors(dtype)
    loss, chosen, rejected = function(objective, **tensors, **options)
    leaves = {name: value for name, value in tensors.items() if value is not None and value.requires_grad}
    grads = torch.autograd.grad(scale * loss, list(leaves.values()))
    return loss.detach(), (chosen, rejected), dict(zip(leaves, grads))


BUDGETS = {"one chunk": 1 << 30, "several chunks": 90_000, "streamed": 30_000, "tiny": 100}


def kind_of(plan):
    """A plan by the names of BUDGETS ("tiny" budgets are streamed too), or "deferred"."""
    if isinstance(plan, StreamingPlan):
        return "streamed"
    if plan.deferred:
        return "deferred"
    return "one chunk" if len(plan.chunks) == 1 else "several chunks"
