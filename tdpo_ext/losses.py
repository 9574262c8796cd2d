"""Pairwise preference losses on per-sequence sums: ordinary differentiable torch code on (B,) tensors."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergence import TokenDivergence

Objective = Callable[[TokenDivergence, TokenDivergence], Tensor]
"""objective(chosen, rejected) -> (pairs,): a loss per pair from per-sequence sums, each pair treated alone."""

VARIANTS = ("tdpo1", "tdpo2")


def check_beta(beta: float) -> None:
    """Raises ValueError unless beta is positive."""
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")


def check_tdpo_options(beta: float, alpha: float, variant: str) -> None:
    """Raises ValueError naming the option that is out of range."""
    check_beta(beta)
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}; it must not be negative")
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; allowed are {' and '.join(map(repr, VARIANTS))}")


def tdpo_loss(
    chosen: TokenDivergence,  # each (B,)
    rejected: TokenDivergence,  # each (B,)
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: str = "tdpo2",
) -> Tensor:  # (B,)
    """Token-level Direct Preference Optimization, a loss per pair.

    Args:
        chosen, rejected: per-sequence sums (`TokenDivergence.per_sequence`) of the two responses of each pair.
        beta: strength of the KL constraint, > 0.
        alpha: weight of the sequence-KL difference in "tdpo2", >= 0; not used by "tdpo1".
        variant: "tdpo1" (arXiv 2404.11999, eq. 14-15) or "tdpo2" (eq. 16-18), which stops the gradient of the chosen
            response's KL.

    Returns:
        -log sigmoid(beta (u - delta)), with u the difference of log-ratios and delta the (alpha-weighted) difference
        KL_rejected - KL_chosen.

    Raises:
        ValueError: an option out of range, named in the message.
    """
    check_tdpo_options(beta, alpha, variant)
    margin = chosen.logratio - rejected.logratio
    if variant == "tdpo1":
        margin = margin - (rejected.kl - chosen.kl)
    else:
        margin = margin - alpha * (rejected.kl - chosen.kl.detach())
    return -F.logsigmoid(beta * margin)


def dpo_loss(
    chosen: TokenDivergence,  # each (B,)
    rejected: TokenDivergence,  # each (B,)
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # (B,)
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7), a loss per pair.

    Args:
        chosen, rejected: per-sequence sums of the two responses of each pair; their `kl` is not used.
        beta: strength of the KL constraint, > 0.
        label_smoothing: probability that a preference is flipped (conservative DPO), in [0, 0.5).

    Raises:
        ValueError: an option out of range, named in the message.
    """
    check_beta(beta)
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    margin = beta * (chosen.logratio - rejected.logratio)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def rewards(sequence: TokenDivergence, *, beta: float) -> Tensor:
    """Implicit rewards beta (logratio + KL), detached, of the shape of `sequence` (arXiv 2404.11999, eq. 11).

    Raises:
        ValueError: beta <= 0.
    """
    check_beta(beta)
    return (beta * (sequence.logratio + sequence.kl)).detach()


_accepted: weakref.WeakSet = weakref.WeakSet()


def check_objective(objective: Objective, device: torch.device) -> None:
    """Tries an objective, once, on two made-up pairs: it must return two losses, each a function of its own pair.

    Raises:
        ValueError: it returns something else, or one pair's loss depends on the other's values.
    """
    with contextlib.suppress(TypeError):  # what can't be hashed or weakly referenced is tried at every call
        if objective in _accepted:
            return
    with torch.enable_grad():
        chosen, rejected = _made_up_pairs(1.0, device), _made_up_pairs(1.3, device)
        leaves = [value.requires_grad_() for side in (chosen, rejected) for value in (side.logps, side.kl)]
        losses = objective(chosen, rejected)
        if not isinstance(losses, Tensor) or losses.shape != (2,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"objective returned {got} for 2 pairs; a loss per pair, shape (2,), is needed")
        for pair, other in ((0, 1), (1, 0)):
            if not losses.requires_grad:
                break
            grads = torch.autograd.grad(losses[pair], leaves, retain_graph=True, allow_unused=True)
            if any(grad is not None and grad[other] != 0 for grad in grads):
                raise ValueError("objective couples pairs: the loss of one pair depends on another pair's values")
    with contextlib.suppress(TypeError):
        _accepted.add(objective)


def _made_up_pairs(scale: float, device: torch.device) -> TokenDivergence:
    """Sums of one side of two pairs."""

    def sums(first: float, second: float) -> Tensor:
        return scale * torch.tensor([first, second], device=device)

    return TokenDivergence(
        logps=sums(-9.0, -7.0),
        ref_logps=sums(-8.0, -6.5),
        kl=sums(0.3, 0.5),
        entropy=sums(2.0, 1.5),
        correct=torch.tensor([1.0, 2.0], device=device),
        tokens=torch.tensor([3.0, 4.0], device=device),
    )
