"""Per-token log-probabilities and full-vocabulary KL from logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .shard import VocabShard, local_parts


class TokenDivergence(NamedTuple):
    """Per-token quantities of a policy against a reference; gradient flows through `logps` and `kl` only.

    All have the shape of the labels and are float32 (float64 for float64 inputs), in nats, and exactly 0 where the
    label is `ignore_index`.

    Attributes:
        logps: log p(label), p being the policy.
        ref_logps: log q(label), q being the reference.
        kl: KL(q || p) over the whole vocabulary: forward KL, reference first (arXiv 2404.11999, eq. 12).
        entropy: entropy of p, a metric.
    """

    logps: Tensor
    ref_logps: Tensor
    kl: Tensor
    entropy: Tensor

    @property
    def logratio(self) -> Tensor:
        """log p(label) - log q(label), in nats."""
        return self.logps - self.ref_logps

    def per_sequence(self) -> TokenDivergence:
        """Sums over the last dimension: (B, T) -> (B,)."""
        return TokenDivergence(*(value.sum(-1) for value in self))

    def chunk(self, chunks: int) -> tuple[TokenDivergence, ...]:
        """Splits dimension 0; `chosen, rejected = d.chunk(2)`.

        Raises:
            ValueError: dimension 0 doesn't divide into `chunks` equal parts.
        """
        if self.logps.dim() == 0 or self.logps.shape[0] % chunks:
            raise ValueError(
                f"chunks is {chunks} but dimension 0 of shape {tuple(self.logps.shape)} doesn't divide by it"
            )
        return tuple(TokenDivergence(*parts) for parts in zip(*(value.chunk(chunks) for value in self)))

    def detach(self) -> TokenDivergence:
        """The same values without a graph."""
        return TokenDivergence(*(value.detach() for value in self))


def check_options(temperature: float, softcap: float | None) -> float:
    """The softcap as the operators want it (0 for none), once both options are found good."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap is {softcap}; it must be positive, or None")
    return 0.0 if softcap is None else float(softcap)


def token_divergence(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    shard: VocabShard | None = None,
) -> TokenDivergence:
    """Log-probabilities and KL of every token, without a temporary as large as the logits.

    Args:
        logits: policy logits, float32, bfloat16, float16 or float64; any strides.
        ref_logits: reference logits, of the same shape, dtype and device; constants: they get no gradient.
        labels: int64, aligned: `labels[i]` is the target of `logits[i]` (see `shift_labels`).
        ignore_index: label of rows that contribute exactly 0 to values and gradients, whatever their logits hold.
        temperature: both logits are divided by it.
        softcap: if given, both logits become softcap * tanh(logits / softcap) first.
        shard: the slice of the vocabulary that these logits are, where it is sharded over a process group. All ranks of
            the group call, and get the same values; the gradient is of this rank's logits. Logits that are DTensors
            sharded along their last dimension need no `shard`.

    Returns:
        TokenDivergence of the shape of `labels`. A row with q > 0 where p = 0 has an infinite kl.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range; the message names it.
        IndexError: a label outside [0, V) that is not `ignore_index` (on CUDA a device assertion).
        RuntimeError: another rank of the shard's group failed; the message is that rank's.

    Source: arXiv 2404.11999, sections 3 and 4; the arithmetic is in docs/math.md.
    """
    cap = check_options(temperature, softcap)
    if not isinstance(logits, Tensor) or logits.dim() == 0:
        raise ValueError("logits must be a tensor of shape (..., vocabulary)")
    for name, tensor in (("ref_logits", ref_logits), ("labels", labels)):
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device} but logits are on {logits.device}")
    parts = {"logits": logits, "ref_logits": ref_logits, "labels": labels}
    parts, found = local_parts(("logits", "ref_logits"), parts, dim=-1)
    shard = shard or found
    where: tuple[int, int, str] = (0, parts["logits"].shape[-1], "")
    if shard is None and where[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: the vocabulary is empty")
    if shard is not None:
        for name in ("logits", "ref_logits"):
            parts[name] = shard.narrow(name, parts[name], -1)
        where = (shard.start, ops.UNKNOWN_SIZE, shard.group.group_name)
    start, size, group_name = where
    logps, ref_logps, kl, entropy, _ = ops.token_divergence(
        *parts.values(), start, size, ignore_index, float(temperature), cap, group_name
    )
    return TokenDivergence(logps, ref_logps.detach(), kl, entropy.detach())


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Aligns Hugging Face style labels with logits: (..., T) -> (..., T).

    Entry t of the result is the token that position t predicts, labels[..., t + 1]; the last is `ignore_index`.

    Raises:
        ValueError: `labels` has no dimension.
    """
    if labels.dim() == 0:
        raise ValueError("labels has no dimensions; (..., tokens) is needed")
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    return shifted
