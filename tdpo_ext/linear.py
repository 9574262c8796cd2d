"""The fused losses: from hidden states and LM-head weights to values and gradients, without the logits."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .divergence import TokenDivergence, check_options
from .fused.chunked import chunked_loss
from .fused.inputs import FusedOptions, LMHead, prepare
from .fused.plan import ChunkedPlan, make_plan, streaming_plan
from .fused.rows import OneSequence, PackedPairs, PaddedPairs
from .fused.streaming import streamed_divergence
from .losses import Objective, check_objective, check_tdpo_options, tdpo_loss
from .vocab_parallel import VocabShard


@torch.compiler.disable
def linear_token_divergence(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (..., D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
) -> TokenDivergence:
    """`token_divergence` of `hidden @ weight.T + bias`, the logits never existing as a whole.

    Differentiable in hidden, weight and bias; the reference gets no gradient. The vocabulary is streamed in slices and
    recomputed in backward (docs/math.md, "streaming"). Logits are float32 even where the inputs are bfloat16 or
    float16. Under autocast, inputs are cast as `torch.nn.functional.linear` casts them.

    Args:
        hidden, weight, bias: the policy's hidden states and LM head, of one dtype.
        ref_hidden, ref_weight, ref_bias: the reference's, whose width may differ.
        labels: int64, aligned with `hidden` (see `shift_labels`).
        logits_budget: bytes that temporaries may take (default: by device, see `fused.plan.default_budget`). It changes
            memory and time, never results beyond rounding.
        ignore_index, temperature, softcap: as in `token_divergence`.
        shard: the rows of both heads that this rank holds, where the vocabulary is sharded over a process group. All
            ranks of the group call with the same hidden states and labels, and get the same values; gradients of
            weight and bias are this rank's, that of hidden is summed over the group. Heads that are DTensors sharded
            along dimension 0 (torch's tensor parallel) need no `shard`.

    Raises:
        ValueError, TypeError, IndexError: as `token_divergence`; the message names the argument.
        RuntimeError: another rank of the shard's group failed; the message is that rank's.
    """
    call = prepare(
        policy=LMHead(hidden, weight, bias),
        reference=LMHead(ref_hidden, ref_weight, ref_bias),
        labels=labels,
        sequences=OneSequence(),
        options=FusedOptions(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logits_budget=logits_budget,
            shard=shard,
        ),
    )
    index = call.rows.index
    plan = streaming_plan(len(index), call.sizes, call.budget, "per-token values are differentiable")
    values = streamed_divergence(call.inputs, index, plan)
    return TokenDivergence.unstack(values.view(-1, *labels.shape))


@torch.compiler.disable
def linear_preference_loss(
    objective: Objective,
    hidden: Tensor,  # (2B, T, D), or packed (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (2B, T, D_ref), or packed (N, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    labels: Tensor,  # (2B, T), or packed (N,)
    *,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
    """Mean pairwise preference loss of B pairs from hidden states, with a memory budget instead of logits.

    The first B sequences are the chosen responses, the last B the rejected ones. Prompt, padding and ignored rows never
    reach the head. The planner works on whole pairs at a time where their logits fit the budget: gradients are then
    formed in the forward pass and nothing is recomputed (4 matrix products, 3 with a frozen head). A longer pair is
    streamed over slices of the vocabulary. docs/math.md describes both plans.

    Args:
        objective: `objective(chosen, rejected) -> (pairs,)` on per-sequence sums, such as
            `functools.partial(tdpo_loss, beta=0.1)`. It sees any number of pairs at a time and must treat each alone.
        cu_seqlens: for packed rows, int32 or int64 offsets of the 2B sequences (flash-attention's convention).
        others: as in `linear_token_divergence`.

    Returns:
        (loss, chosen, rejected): the scalar mean over pairs, and detached per-sequence sums (B,) for metrics. The loss
        can be differentiated once.

    Raises:
        ValueError, TypeError, IndexError: a bad argument, named in the message; an objective that couples pairs.
    """
    check_objective(objective, hidden.device)
    call = prepare(
        policy=LMHead(hidden, weight, bias),
        reference=LMHead(ref_hidden, ref_weight, ref_bias),
        labels=labels,
        sequences=PaddedPairs() if cu_seqlens is None else PackedPairs(cu_seqlens),
        options=FusedOptions(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logits_budget=logits_budget,
            shard=shard,
        ),
    )
    inputs, rows = call.inputs, call.rows
    plan = make_plan(rows.pair_lengths, call.sizes, call.budget)
    if isinstance(plan, ChunkedPlan):
        return chunked_loss(objective, inputs, rows, plan)
    values = streamed_divergence(inputs, rows.index, plan)
    chosen, rejected = TokenDivergence.unstack(rows.segments.sum(values[:, rows.index])).chunk(2)
    return objective(chosen, rejected).mean(), chosen.detach(), rejected.detach()


class LinearTDPOLoss(nn.Module):
    """`linear_preference_loss` with the TDPO objective.

    Args:
        beta, alpha, variant: as in `tdpo_loss`.
        logits_budget, shard, ignore_index, temperature, softcap: as in `linear_token_divergence`.

    Raises:
        ValueError: an option out of range, named in the message.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.5,
        variant: str = "tdpo2",
        logits_budget: int | None = None,
        shard: VocabShard | None = None,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        check_tdpo_options(beta, alpha, variant)
        check_options(temperature, softcap)
        self.objective = functools.partial(tdpo_loss, beta=beta, alpha=alpha, variant=variant)
        self.logits_budget, self.shard = logits_budget, shard
        self.ignore_index, self.temperature, self.softcap = ignore_index, temperature, softcap

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        ref_hidden: Tensor,
        ref_weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        ref_bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
        """As `linear_preference_loss`: (loss, chosen, rejected)."""
        return linear_preference_loss(
            self.objective,
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            labels,
            cu_seqlens=cu_seqlens,
            bias=bias,
            ref_bias=ref_bias,
            ignore_index=self.ignore_index,
            temperature=self.temperature,
            softcap=self.softcap,
            logits_budget=self.logits_budget,
            shard=self.shard,
        )
