"""What `tdpo_ext` is measured against: the published arithmetic, and TRL's streamed kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tdpo_ext import TokenDivergence


def token_values(logps, ref_logps, kl):
    """A TokenDivergence of the fields that losses of peers compute; every label counts, the other fields are 0."""
    not_computed = torch.zeros_like(kl)
    return TokenDivergence(
        logps=logps,
        ref_logps=ref_logps,
        kl=kl,
        entropy=not_computed,
        correct=not_computed,
        tokens=torch.ones_like(kl),
    )


def published(logits, ref_logits, labels):
    """Per-token values as the published TDPO code computes them (arXiv 2404.11999), with everything materialised.

    float32 casts, log_softmax of the policy, softmax().log() of the reference; no entropy, no accuracy, no masks.
    """
    log_p = logits.float().log_softmax(-1)
    q = ref_logits.float().softmax(-1)
    log_q = q.log()
    kl = (q * (log_q - log_p)).sum(-1)
    index = labels.clamp(min=0)[..., None]
    logps, ref_logps = (values.gather(-1, index)[..., 0] for values in (log_p, log_q))
    return token_values(logps, ref_logps, kl)


def published_linear(objective, hidden, weight, ref_hidden, ref_weight, labels):
    """`published` behind both LM heads, then the pairwise loss: (loss, chosen, rejected)."""
    logits, ref_logits = F.linear(hidden, weight), F.linear(ref_hidden, ref_weight)
    chosen, rejected = published(logits, ref_logits, labels).per_sequence().chunk(2)
    return objective(chosen, rejected).mean(), chosen, rejected


def trl_linear(hidden, weight, ref_hidden, ref_weight, labels):
    """Per-token values by TRL's streamed kernels: the forward KL, and log-probabilities of policy and reference.

    hidden (..., D), weight (V, D), labels (...), none of them ignored.
    """
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rows, ref_rows, shape = hidden.flatten(0, -2), ref_hidden.flatten(0, -2), labels.shape

    def logps(hidden, weight):
        return ChunkedLogProbFunction.apply(hidden, weight, None, labels.flatten(), 1.0, 32768, None, 1.0, ())[0]

    both_heads = (rows, weight, None, ref_rows, ref_weight, None)
    kl, _ = ChunkedDivergenceFunction.apply(*both_heads, 0.0, 1.0, 1.0, None, 1.0, None)  # 0.0: the forward KL
    with torch.no_grad():
        ref_logps = logps(ref_rows, ref_weight)
    return token_values(logps(rows, weight).view(shape), ref_logps.view(shape), kl.view(shape))
