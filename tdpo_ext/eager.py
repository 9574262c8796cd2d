"""The oracle: TDPO in plain torch, straight from the paper, with every (tokens, vocabulary) tensor materialised.

Slow and large on purpose. Pass float64 tensors for a ground truth. `tdpo_ext` is tested against these functions, and
they are the "eager" peer of the benchmarks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .divergence import TokenDivergence


def token_divergence(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    kl_direction: str = "forward",
) -> TokenDivergence:
    """Same contract as `tdpo_ext.token_divergence` (arXiv 2404.11999, eq. 12 for the KL)."""
    dtype = torch.promote_types(torch.promote_types(logits.dtype, ref_logits.dtype), torch.float32)
    logits, ref_logits = logits.to(dtype), ref_logits.to(dtype)
    kept = labels != ignore_index
    # Selection, not multiplication: an ignored row may hold NaN or inf.
    logits = torch.where(kept[..., None], logits, 0.0)
    ref_logits = torch.where(kept[..., None], ref_logits, 0.0).detach()
    if softcap is not None:
        logits, ref_logits = (softcap * torch.tanh(x / softcap) for x in (logits, ref_logits))
    log_p = torch.log_softmax(logits / temperature, -1)
    log_q = torch.log_softmax(ref_logits / temperature, -1)
    index = torch.where(kept, labels, 0)[..., None]

    p, q = log_p.exp(), log_q.exp()
    if kl_direction == "reverse":
        kl = torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)
    else:
        kl = torch.where(q > 0, q * (log_q - log_p), 0.0).sum(-1)
    divergence = TokenDivergence(
        logps=log_p.gather(-1, index)[..., 0],
        ref_logps=log_q.gather(-1, index)[..., 0],
        kl=kl,
        entropy=-torch.where(p > 0, p * log_p, 0.0).sum(-1).detach(),
        correct=(log_p.gather(-1, index)[..., 0] == log_p.amax(-1)).to(log_p.dtype),
        tokens=kept.to(log_p.dtype),
    )
    return TokenDivergence._make(torch.where(kept, value, 0.0) for value in divergence)


def linear_token_divergence(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (..., D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    **options,
) -> TokenDivergence:
    """Same contract as `tdpo_ext.linear_token_divergence`: both heads, then `token_divergence` of their logits."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * logit_scale
    ref_logits = torch.nn.functional.linear(ref_hidden, ref_weight, ref_bias) * ref_logit_scale
    return token_divergence(logits, ref_logits, labels, **options)


def linear_preference_loss(objective, hidden, weight, ref_hidden, ref_weight, labels, **options):
    """Same contract as `tdpo_ext.linear_preference_loss` for padded (2B, T, D) input: (loss, chosen, rejected)."""
    divergence = linear_token_divergence(hidden, weight, ref_hidden, ref_weight, labels, **options)
    chosen, rejected = divergence.per_sequence().chunk(2)
    return objective(chosen, rejected).mean(), chosen.detach(), rejected.detach()


def linear_token_loss(objective, hidden, weight, ref_hidden, ref_weight, labels, **options):
    """Same contract as `tdpo_ext.linear_token_loss` for padded (B, T, D) input: (loss, values)."""
    values = linear_token_divergence(hidden, weight, ref_hidden, ref_weight, labels, **options).per_sequence()
    return objective(values).mean(), values.detach()
