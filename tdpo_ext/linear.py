"""The fused losses: from hidden states and LM-head weights to values and gradients, without the logits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from .compilation import runs_eagerly
from .divergence import TokenDivergence
from .fused.call import fused_loss
from .fused.heads import CallTensors, Weight
from .fused.inputs import prepare
from .fused.options import FusedOptions
from .fused.planning.choose import streaming_plan
from .fused.rows import OneSequence, sequences_of
from .fused.streaming import streamed_divergence
from .losses import Objective
from .vocab_parallel import VocabShard


@runs_eagerly
def linear_token_divergence(
    hidden: Tensor,  # (..., D)
    weight: Weight,  # (V, D), or parts (V, D_i)
    ref_hidden: Tensor | None,  # (..., D_ref)
    ref_weight: Weight | None,  # (V, D_ref), or parts
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    kl_direction: str = "forward",
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
) -> TokenDivergence:
    """`token_divergence` of `hidden @ weight.T + bias`, the logits never existing as a whole.

    Differentiable in hidden, weight and bias; the reference gets no gradient. The vocabulary is streamed in slices and
    recomputed in backward (docs/math.md, "streaming"). Logits are float32 even where the inputs are bfloat16 or
    float16. Under autocast, inputs are cast as `torch.nn.functional.linear` casts them.

    Args:
        hidden, weight, bias: the policy's hidden states and LM head, of one dtype. A weight may be several tensors that
            lie side by side, (V, D_1), (V, D_2), ..., whose widths add up to D; none is copied. So a LoRA adapter of a
            head is exact with hidden states [h, s h A^T] and weights [W, B].
        ref_hidden, ref_weight, ref_bias: the reference's, of one dtype. Width and dtype may differ from the policy's,
            as where a bfloat16 reference stands beside float32 master weights. None: there is no reference, for which
            no product is taken; `ref_logps` and `kl` are NaN at the rows that count.
        labels: int64, aligned with `hidden` (see `shift_labels`).
        logits_budget: bytes that temporaries may take (default: by device, see
            `fused.planning.plan.default_budget`). It changes memory and time, never results beyond rounding.
        logit_scale, ref_logit_scale: each model's logits, its bias included, are multiplied by its own before the cap
            and the temperature (Cohere and Granite scale theirs).
        ignore_index, temperature, softcap, kl_direction: as in `token_divergence`.
        shard: the rows of both heads that this rank holds, where the vocabulary is sharded over a process group. All
            ranks of the group call with the same hidden states and labels, and get the same values; gradients of
            weight and bias are this rank's, that of hidden is summed over the group. Heads that are DTensors sharded
            along dimension 0 (torch's tensor parallel) need no `shard`.

    Raises:
        ValueError, TypeError, IndexError: as `token_divergence`; the message names the argument.
        RuntimeError: another rank of the shard's group failed; the message is that rank's.
    """
    inputs, rows, plan_inputs = prepare(
        CallTensors.of_call(
            hidden, weight, bias, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
        ),
        OneSequence(),
        FusedOptions(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logit_scale=ref_logit_scale,
            kl_direction=kl_direction,
            logits_budget=logits_budget,
            shard=shard,
        ),
    )
    plan = streaming_plan(len(rows.index), plan_inputs.sizes, plan_inputs.budget, "per-token values are differentiable")
    values = streamed_divergence(inputs, rows.index, plan)
    return TokenDivergence._make(value.view(labels.shape) for value in values)


def linear_logps(
    hidden: Tensor,  # (..., D)
    weight: Weight,  # (V, D), or parts (V, D_i)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
) -> Tensor:  # (...)
    """Log-probabilities of the labels under one model, differentiable: `linear_token_divergence` without a reference.

    Args:
        others: as in `linear_token_divergence`.

    Returns:
        log p(label), float32 (float64 for float64 inputs), exactly 0 where the label is `ignore_index`.

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `linear_token_divergence`.
    """
    divergence = linear_token_divergence(
        hidden,
        weight,
        None,
        None,
        labels,
        bias=bias,
        ignore_index=ignore_index,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
        logits_budget=logits_budget,
        shard=shard,
    )
    return divergence.logps


@runs_eagerly
def linear_preference_loss(
    objective: Objective,
    hidden: Tensor,  # (2B, T, D), or packed (N, D)
    weight: Weight,  # (V, D), or parts (V, D_i)
    ref_hidden: Tensor | None,  # (2B, T, D_ref), or packed (N, D_ref)
    ref_weight: Weight | None,  # (V, D_ref), or parts
    labels: Tensor,  # (2B, T), or packed (N,)
    *,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    row_lengths: Sequence[int] | None = None,  # 2B
    token_columns: Mapping[str, Tensor] | None = None,  # each of labels' shape
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    kl_direction: str = "forward",
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
    """Mean pairwise preference loss of B pairs from hidden states, with a memory budget instead of logits.

    The first B sequences are the chosen responses, the last B the rejected ones. Prompt, padding and ignored rows never
    reach the head. The planner takes whole pairs at a time where their logits fit the budget and that is fastest:
    gradients are formed in the forward pass and nothing is recomputed (4 matrix products, 3 with a frozen head). A
    longer pair is taken a block of rows at a time where the objective is a `MarginLoss`, with as many products, or
    where head and bias are frozen and not sharded, with one more; else it is streamed over slices of the vocabulary,
    and logits are computed twice. docs/math.md describes the plans.

    Args:
        objective: `objective(chosen, rejected) -> (pairs,)` on per-sequence sums, such as
            `functools.partial(tdpo_loss, beta=0.1)`, or on tokens (see `per_token`). It sees any number of pairs at a
            time and must treat each alone. A `MarginLoss` (as `tdpo_loss` and `dpo_loss` are) needs no recompute for
            pairs of any length.
        cu_seqlens: for packed rows, int32 or int64 offsets of the 2B sequences (flash-attention's convention).
        ref_hidden, ref_weight, ref_bias: None for an objective that reads neither `ref_logps` nor `kl` (SimPO): no
            reference is then needed, and its products are not taken.
        row_lengths: for packed rows, the lengths of the 2B sequences as Python integers, given by a collator that knows
            them and has left out prompt, padding and ignored rows. Nothing is then read back from the device; with
            cu_seqlens on the device too, nothing is uploaded and the call can be captured in a CUDA graph.
        token_columns: numbers per token for objectives decorated with `per_token`, by name; they may require gradients.
        others: as in `linear_token_divergence`.

    Returns:
        (loss, chosen, rejected): the scalar mean over pairs, and detached per-sequence sums (B,) for metrics. The loss
        can be differentiated once.

    Raises:
        ValueError, TypeError, IndexError: a bad argument, named in the message; an objective that couples pairs.
    """
    loss, (chosen, rejected) = fused_loss(
        "linear_preference_loss",
        objective,
        CallTensors.of_call(
            hidden, weight, bias, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
        ),
        sequences=sequences_of(cu_seqlens, row_lengths, sides=2),
        token_columns=token_columns,
        options=FusedOptions(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logit_scale=ref_logit_scale,
            kl_direction=kl_direction,
            logits_budget=logits_budget,
            shard=shard,
        ),
    )
    return loss, chosen, rejected


@runs_eagerly
def linear_token_loss(
    objective: Objective,
    hidden: Tensor,  # (B, T, D), or packed (N, D)
    weight: Weight,  # (V, D), or parts (V, D_i)
    ref_hidden: Tensor | None,  # (B, T, D_ref), or packed (N, D_ref)
    ref_weight: Weight | None,  # (V, D_ref), or parts
    labels: Tensor,  # (B, T), or packed (N,)
    *,
    cu_seqlens: Tensor | None = None,  # (B + 1,)
    row_lengths: Sequence[int] | None = None,  # B
    token_columns: Mapping[str, Tensor] | None = None,  # each of labels' shape
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ref_logit_scale: float = 1.0,
    kl_direction: str = "forward",
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
) -> tuple[Tensor, TokenDivergence]:
    """Mean loss of B sequences alone from hidden states: unpaired losses, and distillation with the exact KL.

    As `linear_preference_loss`, with gradients formed in the forward pass, for objectives that take one sequence at a
    time instead of a pair. The reference is whatever the KL is taken to: a frozen start, or a teacher, whose rows may
    come from another prompt, as long as row i of both predicts labels[i].

        kl = tdpo_ext.MarginLoss(tdpo_ext.per_token(lambda rows: rows.mean(rows.kl)), lambda mean: mean)
        loss, sums = tdpo_ext.linear_token_loss(kl, hidden, head, teacher_hidden, teacher_head, labels,
                                                kl_direction="reverse")

    Args:
        objective: `objective(values) -> (sequences,)` of per-sequence sums (TokenDivergence) or, decorated with
            `per_token`, of tokens (TokenRows); each sequence must be treated alone. As a `MarginLoss`, which is
            link(margin(values)), it needs no recompute for sequences of any length.
        cu_seqlens, row_lengths: of packed rows, as in `linear_preference_loss`, for B sequences.
        others: as in `linear_preference_loss`.

    Returns:
        (loss, values): the scalar mean over sequences, and detached per-sequence sums (B,) for metrics. The loss can be
        differentiated once. The mean over all tokens of a batch is the mean over sequences of each sum times
        B / (tokens of the batch), a constant that the objective may hold.

    Raises:
        ValueError, TypeError, IndexError: a bad argument, named in the message; an objective that couples sequences.
    """
    loss, (values,) = fused_loss(
        "linear_token_loss",
        objective,
        CallTensors.of_call(
            hidden, weight, bias, labels, ref_hidden=ref_hidden, ref_weight=ref_weight, ref_bias=ref_bias
        ),
        sequences=sequences_of(cu_seqlens, row_lengths, sides=1),
        token_columns=token_columns,
        options=FusedOptions(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logit_scale=ref_logit_scale,
            kl_direction=kl_direction,
            logits_budget=logits_budget,
            shard=shard,
        ),
    )
    return loss, values
