"""Pairwise preference losses on per-sequence sums. They are ordinary differentiable torch code on (B,) tensors."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .divergence import TokenDivergence

VARIANTS = ("tdpo1", "tdpo2")


def check_loss_options(beta: float, alpha: float, variant: str) -> None:
    """Raises ValueError naming the option that is out of range."""
    if not beta > 0:
        raise ValueError(f"beta is {beta}; it must be positive")
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
        -log sigmoid(beta (u - delta)), with u the difference of log-ratios and delta the (weighted) difference
        KL_rejected - KL_chosen.

    Raises:
        ValueError: an option out of range, named in the message.
    """
    check_loss_options(beta, alpha, variant)
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
    check_loss_options(beta, 0.0, "tdpo1")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
    margin = beta * (chosen.logratio - rejected.logratio)
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def rewards(sequence: TokenDivergence, *, beta: float) -> Tensor:
    """Implicit rewards beta (logratio + KL), detached, of the shape of `sequence` (arXiv 2404.11999, eq. 11).

    Raises:
        ValueError: beta <= 0.
    """
    check_loss_options(beta, 0.0, "tdpo1")
    return (beta * (sequence.logratio + sequence.kl)).detach()
