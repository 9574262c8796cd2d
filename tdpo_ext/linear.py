"""The fused losses: from hidden states and LM-head weights to values and gradients, without the logits."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from . import checks
from .compilation import breaks_graph
from .divergence import TokenDivergence
from .fused.chunked import chunked_loss
from .fused.heads import CallTensors, Head
from .fused.inputs import check_columns, prepare
from .fused.options import FusedOptions
from .fused.pair_loss import PairLoss
from .fused.planning.choose import make_plan, streaming_plan
from .fused.planning.plan import ChunkedPlan
from .fused.rows import KnownLengths, OneSequence, Packed, Padded, Sequences
from .fused.streaming import streamed_divergence, streamed_loss
from .losses import Objective, dpo_margin_loss, margin_form, tdpo_margin_loss, weighted_tokens
from .objective_checks import check_objective
from .plain_checks import VARIANTS
from .vocab_parallel import Fact, VocabShard, digest

_eagerly = breaks_graph("tdpo_ext's fused losses plan by the lengths of a batch and run as they are")


@_eagerly
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
        hidden, weight, bias: the policy's hidden states and LM head, of one dtype.
        ref_hidden, ref_weight, ref_bias: the reference's, of one dtype. Width and dtype may differ from the policy's,
            as where a bfloat16 reference stands beside float32 master weights.
        labels: int64, aligned with `hidden` (see `shift_labels`).
        logits_budget: bytes that temporaries may take (default: by device, see
            `fused.planning.plan.default_budget`). It changes memory and time, never results beyond rounding (in
            float16, gradients may underflow: docs/math.md).
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
        CallTensors(hidden, Head(weight, bias), ref_hidden, Head(ref_weight, ref_bias), labels),
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


@_eagerly
def linear_preference_loss(
    objective: Objective,
    hidden: Tensor,  # (2B, T, D), or packed (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (2B, T, D_ref), or packed (N, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
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
    longer pair is taken a block of rows at a time where the objective is a `MarginLoss`, with as many products; other
    objectives stream it over slices of the vocabulary and compute logits twice. docs/math.md describes the plans.

    Args:
        objective: `objective(chosen, rejected) -> (pairs,)` on per-sequence sums, such as
            `functools.partial(tdpo_loss, beta=0.1)`, or on tokens (see `per_token`). It sees any number of pairs at a
            time and must treat each alone. A `MarginLoss` (as `tdpo_loss` and `dpo_loss` are) needs no recompute for
            pairs of any length.
        cu_seqlens: for packed rows, int32 or int64 offsets of the 2B sequences (flash-attention's convention).
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
    loss, (chosen, rejected) = _loss(
        "linear_preference_loss",
        objective,
        CallTensors(hidden, Head(weight, bias), ref_hidden, Head(ref_weight, ref_bias), labels),
        sequences=_sequences(cu_seqlens, row_lengths, sides=2),
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


@_eagerly
def linear_token_loss(
    objective: Objective,
    hidden: Tensor,  # (B, T, D), or packed (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (B, T, D_ref), or packed (N, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
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
    loss, (values,) = _loss(
        "linear_token_loss",
        objective,
        CallTensors(hidden, Head(weight, bias), ref_hidden, Head(ref_weight, ref_bias), labels),
        sequences=_sequences(cu_seqlens, row_lengths, sides=1),
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


def _loss(
    function: str,
    objective: Objective,
    tensors: CallTensors,
    *,
    sequences: Sequences,
    token_columns: Mapping[str, Tensor] | None,
    options: FusedOptions,
) -> tuple[Tensor, list[TokenDivergence]]:
    """The mean loss, and sums of each side's sequences, of the public `function`."""
    if token_columns is not None and not isinstance(token_columns, Mapping):
        raise TypeError(f"token_columns is {checks.describe(token_columns)}; tensors by name are needed")
    columns = dict(token_columns or {})

    def check_alone() -> list[Fact]:
        checks.function("objective", objective)
        check_columns(columns, tensors.labels)
        of_columns = 0 if options.shard is None else sum(digest(column) for column in columns.values()) >> 8
        losses = check_objective(objective, tensors.labels.device, list(columns), sides=sequences.sides)
        return [
            Fact("objective", losses, "objective"),
            Fact("columns", of_columns, "token_columns"),
        ]

    inputs, rows, plan_inputs = prepare(tensors, sequences, options, check_alone)
    margin_loss = margin_form(objective)
    plan = make_plan(
        rows.pair_lengths,
        plan_inputs.sizes,
        plan_inputs.budget,
        can_defer=margin_loss is not None,
        device_type=inputs.device.type,
    )
    flat_columns = {name: column.reshape(-1) for name, column in columns.items()}
    loss = PairLoss(function, margin_loss or objective, inputs, rows, flat_columns)
    if isinstance(plan, ChunkedPlan):
        return loss.apply(functools.partial(chunked_loss, loss, plan))
    return loss.apply(functools.partial(streamed_loss, loss, plan))


def _sequences(cu_seqlens: Tensor | None, row_lengths: Sequence[int] | None, *, sides: int) -> Sequences:
    if row_lengths is not None:
        return KnownLengths(row_lengths, cu_seqlens, sides)
    return Padded(sides) if cu_seqlens is None else Packed(cu_seqlens, sides)


class LinearTDPOLoss(nn.Module):
    """TDPO, or DPO, from hidden states: `linear_preference_loss` with that objective, as a module without parameters.

        loss_fn = LinearTDPOLoss(beta=0.1)
        loss, chosen, rejected = loss_fn(hidden, lm_head.weight, ref_hidden, ref_lm_head.weight, labels)

    It prints its options, and can be copied and pickled where it has no `shard`.

    Args:
        beta: strength of the KL constraint, > 0.
        alpha: weight of the sequence-KL difference in "tdpo2", >= 0; not used by "tdpo1" and "dpo".
        variant: "tdpo2" or "tdpo1" (`tdpo_loss`), or "dpo" (`dpo_loss`, which has label smoothing too).
        logits_budget: bytes that temporaries may take (default: by device). It changes memory and time, never results
            beyond rounding.
        shard: the rows of both heads that this rank holds, where the vocabulary is sharded over a process group.
        ignore_index: label of rows that contribute exactly 0 to values and gradients.
        temperature: both models' logits are divided by it.
        softcap: if given, both models' logits become softcap * tanh(logits / softcap) first.
        logit_scale, ref_logit_scale: each model's logits are multiplied by its own before the cap and the temperature.
        kl_direction: "forward" for KL(reference || policy), TDPO's, or "reverse" for KL(policy || reference).

    Raises:
        ValueError, TypeError: an option out of range or of the wrong type, named in the message.
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
        logit_scale: float = 1.0,
        ref_logit_scale: float = 1.0,
        kl_direction: str = "forward",
    ) -> None:
        super().__init__()
        checks.choice("variant", variant, (*VARIANTS, "dpo"))
        checks.real("alpha", alpha, least=0)
        self.beta, self.alpha, self.variant = beta, alpha, variant
        if variant == "dpo":
            self.objective = dpo_margin_loss(beta=beta)
        else:
            self.objective = tdpo_margin_loss(beta=beta, alpha=alpha, variant=variant)
        self.weighted_objective = weighted_tokens(self.objective)
        self.options = FusedOptions(
            ignore_index=ignore_index,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            ref_logit_scale=ref_logit_scale,
            kl_direction=kl_direction,
            logits_budget=logits_budget,
            shard=shard,
        )
        self.options.check()

    def extra_repr(self) -> str:
        options = {"beta": self.beta, "alpha": self.alpha, "variant": self.variant, **vars(self.options)}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())

    @_eagerly
    def forward(
        self,
        hidden: Tensor,  # (2B, T, D), or packed (N, D)
        weight: Tensor,  # (V, D)
        ref_hidden: Tensor,  # (2B, T, D_ref), or packed (N, D_ref)
        ref_weight: Tensor,  # (V, D_ref)
        labels: Tensor,  # (2B, T), or packed (N,)
        *,
        bias: Tensor | None = None,  # (V,)
        ref_bias: Tensor | None = None,  # (V,)
        cu_seqlens: Tensor | None = None,  # (2B + 1,)
        row_lengths: Sequence[int] | None = None,  # 2B
        token_columns: Mapping[str, Tensor] | None = None,  # each of labels' shape
    ) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
        """The mean loss over B pairs, and sums of the chosen and the rejected responses.

        Args:
            hidden, weight, bias: the policy's hidden states and LM head; the first B sequences are chosen responses.
            ref_hidden, ref_weight, ref_bias: the reference's.
            labels: int64, aligned with `hidden` (see `shift_labels`), `ignore_index` where a token does not count.
            cu_seqlens, row_lengths: of packed rows, as in `linear_preference_loss`.
            token_columns: {"weight": numbers}: every token's log-probabilities and KL count as often in the loss as its
                number says (the sums that are returned are not weighted). A weight that requires a gradient gets it.

        Returns:
            (loss, chosen, rejected): the scalar loss, and detached per-sequence sums (B,) for metrics.

        Raises:
            ValueError, TypeError, IndexError: a bad argument, named in the message.
        """
        if isinstance(token_columns, Mapping) and token_columns and set(token_columns) != {"weight"}:
            raise ValueError(f"token_columns has {', '.join(map(repr, token_columns))}; this loss reads 'weight' alone")
        loss, (chosen, rejected) = _loss(
            "LinearTDPOLoss",
            self.weighted_objective if token_columns else self.objective,
            CallTensors(hidden, Head(weight, bias), ref_hidden, Head(ref_weight, ref_bias), labels),
            sequences=_sequences(cu_seqlens, row_lengths, sides=2),
            token_columns=token_columns,
            options=self.options,
        )
        return loss, chosen, rejected
