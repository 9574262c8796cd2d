"""What a fused loss reads: the two LM heads with their hidden states, the labels and the options, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..divergence import check_options, check_shard
from ..ops import operators
from ..ops.matmul import full_precision, product
from ..ops.operators import RowOptions
from ..vocab_parallel import Exchange, VocabShard, digest, local_tensors
from .plan import Sizes, resolved_budget
from .rows import Rows, Sequences


@dataclass(frozen=True)
class LMHead:
    """Hidden states and the head that makes logits of them.

    Attributes:
        hidden: (..., D); flat, (N, D), once the inputs are prepared.
        weight: (V, D), of this rank's slice of the vocabulary.
        bias: (V,), or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def cast(self, dtype: torch.dtype) -> LMHead:
        """The same in another precision."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return LMHead(self.hidden.to(dtype), self.weight.to(dtype), bias)

    def detach(self) -> LMHead:
        """The same without a graph."""
        bias = None if self.bias is None else self.bias.detach()
        return LMHead(self.hidden.detach(), self.weight.detach(), bias)

    def flat(self) -> LMHead:
        """With rows in one dimension: hidden (N, D)."""
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Logits of some rows' hidden states over some columns, in the precision of `out`, which is returned."""
        with full_precision(hidden.device):
            product(hidden, self.weight[columns].t(), out)
        if self.bias is not None:
            out += self.bias[columns]
        return out


@dataclass(frozen=True)
class GatheredRows:
    """Some rows side by side: hidden (n, D), ref_hidden (n, D_ref), labels (n,)."""

    hidden: Tensor
    ref_hidden: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FusedOptions:
    """The options of the public functions, as they were given."""

    ignore_index: int
    temperature: float
    softcap: float | None
    logits_budget: int | None
    shard: VocabShard | None


@dataclass(frozen=True)
class FusedInputs:
    """Both heads, flat and checked, over what this rank holds of the vocabulary.

    Attributes:
        policy, reference: of one dtype; widths may differ. The reference carries no graph.
        labels: (N,), token ids of the whole vocabulary.
        options: for the kernels; column 0 is the heads' first row.
        exchange: with the other ranks, where the vocabulary is sharded.
    """

    policy: LMHead
    reference: LMHead
    labels: Tensor
    options: RowOptions
    exchange: Exchange

    @property
    def vocab(self) -> int:
        """Entries of the vocabulary that this rank holds."""
        return self.policy.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.policy.hidden.device

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the weights, the hidden states and their gradients."""
        return self.policy.weight.dtype

    @property
    def logit_dtype(self) -> torch.dtype:
        """Of the logits and of everything that is accumulated."""
        return operators.state_dtype(self.weight_dtype)

    @property
    def sums_hidden_grad(self) -> bool:
        """Whether dhidden is summed over the ranks of a shard."""
        return self.exchange.shard is not None and self.exchange.shard.sum_hidden_grad

    def rows_at(self, index: Tensor, labels: Tensor) -> GatheredRows:
        """The rows at `index`, whose labels are `labels`."""
        return GatheredRows(self.policy.hidden[index], self.reference.hidden[index], labels)

    def row_states(self, rows: GatheredRows, columns: slice, *, z: Tensor, r: Tensor) -> Tensor:
        """States of some rows over some columns; leaves the logits in `z` and `r`, (rows, columns)."""
        self.policy.logits(rows.hidden, columns, out=z)
        self.reference.logits(rows.ref_hidden, columns, out=r)
        return operators.row_states(z, r, rows.labels, self.options.from_column(columns.start))

    def merge_over_ranks(self, rows: int, local_states: Callable[[], Tensor]) -> Tensor:
        """The states that `local_states` computes of `rows` rows over this rank's vocabulary, merged over all ranks."""
        return self.exchange.merged_row_states(local_states, (rows,), self.logit_dtype, self.device)

    def finalize(self, states: Tensor, labels: Tensor) -> Tensor:
        """Values of rows from their states, (fields, rows), in the order of TokenDivergence."""
        return operators.finalize_row_states(
            states, labels, ignore_index=self.options.ignore_index, temperature=self.options.temperature
        )


@dataclass(frozen=True)
class FusedCall:
    """A public call, ready to be planned.

    Attributes:
        rows: which rows reach the heads, and which sequence each belongs to.
        sizes: what the planner decides by; the same on every rank of a shard.
        budget: bytes that temporaries may take.
    """

    inputs: FusedInputs
    rows: Rows
    sizes: Sizes
    budget: int


# What the ranks of a shard must share, and whose argument it is.
_AGREED_ON = {
    "rows": "labels",
    "labels": "labels",
    "lengths": "labels (or cu_seqlens)",
    "bytes": "weight",
    "width": "hidden",
    "ref_width": "ref_hidden",
    "ignore_index": "ignore_index",
    "temperature": "temperature",
    "softcap": "softcap",
    "objective": "objective",
    "columns": "token_columns",
    "grad mode": "torch.is_grad_enabled()",
    "hidden gradient": "hidden.requires_grad",
    "sum_hidden_grad": "shard",
}


def prepare(
    policy: LMHead,
    reference: LMHead,
    labels: Tensor,
    sequences: Sequences,
    options: FusedOptions,
    check_objective: Callable[[], dict[str, int | float]] = dict,
) -> FusedCall:
    """Checks and flattens the arguments of a fused loss, and agrees on them with the other ranks of a shard.

    Args:
        check_objective: checks what a preference loss takes beside these, and tells what ranks must share of it.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range; the message names it.
        RuntimeError: another rank failed; the message is that rank's.
    """
    _check_types(policy, reference, labels)
    check_shard(options.shard)
    policy, reference, labels, dtensor_shard = _local_heads(policy, reference, labels)
    shard = options.shard if options.shard is not None else dtensor_shard

    def checked() -> tuple[FusedInputs, Rows, int, dict[str, int | float]]:
        objective_facts = check_objective()
        check_options(options.ignore_index, options.temperature, options.softcap)
        budget = resolved_budget(options.logits_budget, policy.hidden.device)
        heads = _autocast(*_narrowed(policy, reference, shard))
        _check_heads(*heads, labels)
        if shard is None and heads[0].weight.shape[0] == 0:
            raise ValueError("weight has no rows: the vocabulary is empty")
        inputs = FusedInputs(
            policy=heads[0].flat(),
            reference=heads[1].detach().flat(),
            labels=labels.reshape(-1),
            options=RowOptions(
                vocab_start=0 if shard is None else shard.start,
                vocab_size=heads[0].weight.shape[0],
                ignore_index=options.ignore_index,
                temperature=float(options.temperature),
                softcap=0.0 if options.softcap is None else float(options.softcap),
            ),
            exchange=Exchange(shard),
        )
        return inputs, sequences.rows(labels, options.ignore_index), budget, objective_facts

    def with_facts() -> tuple[tuple[FusedInputs, Rows], dict[str, int | float]]:
        inputs, rows, budget, objective_facts = checked()
        return (inputs, rows), {
            "vocab": inputs.vocab,
            "budget": budget,
            "weight gradient": inputs.policy.weight.requires_grad,
            "rows": len(rows.index),
            "labels": digest(inputs.labels[rows.index]),
            "lengths": digest(rows.lengths_on_device),
            "bytes": inputs.weight_dtype.itemsize,
            "width": inputs.policy.width,
            "ref_width": inputs.reference.width,
            "ignore_index": inputs.options.ignore_index,
            "temperature": inputs.options.temperature,
            "softcap": inputs.options.softcap,
            "grad mode": torch.is_grad_enabled(),
            "hidden gradient": inputs.policy.hidden.requires_grad,
            "sum_hidden_grad": inputs.sums_hidden_grad,
            **objective_facts,
        }

    if shard is None:
        inputs, rows, budget, _ = checked()
        sizes = _sizes(inputs, vocab=inputs.vocab, weight_gradient=inputs.policy.weight.requires_grad)
        return FusedCall(inputs, rows, sizes, budget)
    (inputs, rows), ranks = shard.agree(policy.hidden.device, with_facts)
    ranks.check_same(_AGREED_ON)
    inputs = replace(inputs, options=replace(inputs.options, vocab_size=ranks.vocab_size))
    # One plan for all ranks: that of the widest shard, the smallest budget, and a gradient if any rank wants its.
    sizes = _sizes(inputs, vocab=max(ranks.by_rank["vocab"]), weight_gradient=any(ranks.by_rank["weight gradient"]))
    return FusedCall(inputs, rows, sizes, min(ranks.by_rank["budget"]))


def check_columns(columns: Mapping[str, Tensor], labels: Tensor) -> None:
    """Raises ValueError or TypeError where a column is no floating-point tensor of the labels' shape and device."""
    for name, column in columns.items():
        checks.float_tensor(f"token_columns[{name!r}]", column)
        if column.shape != labels.shape or column.device != labels.device:
            raise ValueError(
                f"token_columns[{name!r}] has shape {tuple(column.shape)} on {column.device}; that of labels, "
                f"{tuple(labels.shape)} on {labels.device}, is needed"
            )


def _local_heads(policy: LMHead, reference: LMHead, labels: Tensor) -> tuple[LMHead, LMHead, Tensor, VocabShard | None]:
    """The local parts of arguments that are DTensors, and the shard that their heads are."""
    sharded = {
        "weight": policy.weight,
        "bias": policy.bias,
        "ref_weight": reference.weight,
        "ref_bias": reference.bias,
    }
    replicated = {"hidden": policy.hidden, "ref_hidden": reference.hidden, "labels": labels}
    local, shard = local_tensors(sharded, replicated, vocab_dim=0)
    policy = LMHead(hidden=local["hidden"], weight=local["weight"], bias=local["bias"])
    reference = LMHead(hidden=local["ref_hidden"], weight=local["ref_weight"], bias=local["ref_bias"])
    return policy, reference, local["labels"], shard


def _narrowed(policy: LMHead, reference: LMHead, shard: VocabShard | None) -> tuple[LMHead, LMHead]:
    """Both heads without padding beyond the shard."""
    if shard is None:
        return policy, reference

    def narrow(head: LMHead, prefix: str) -> LMHead:
        bias = None if head.bias is None else shard.narrow(f"{prefix}bias", head.bias, 0)
        return LMHead(head.hidden, shard.narrow(f"{prefix}weight", head.weight, 0), bias)

    return narrow(policy, ""), narrow(reference, "ref_")


def _autocast(policy: LMHead, reference: LMHead) -> tuple[LMHead, LMHead]:
    """The casts of `torch.nn.functional.linear` under autocast; unchanged without."""
    device_type = policy.hidden.device.type
    if not torch.is_autocast_enabled(device_type):
        return policy, reference
    dtype = torch.get_autocast_dtype(device_type)
    return policy.cast(dtype), reference.cast(dtype)


def _check_types(policy: LMHead, reference: LMHead, labels: Tensor) -> None:
    """Raises TypeError or ValueError naming the first argument that is no tensor that the kernels know."""
    for prefix, head in (("", policy), ("ref_", reference)):
        checks.float_tensor(f"{prefix}hidden", head.hidden)
        checks.float_tensor(f"{prefix}weight", head.weight)
        if head.bias is not None:
            checks.float_tensor(f"{prefix}bias", head.bias)
    checks.label_tensor("labels", labels)


def _check_heads(policy: LMHead, reference: LMHead, labels: Tensor) -> None:
    """Raises ValueError or TypeError naming the first argument whose shape, dtype or device doesn't fit."""
    hidden, weight, ref_hidden = policy.hidden, policy.weight, reference.hidden
    vocab = weight.shape[:1]
    expected = {
        "hidden": (hidden, (*labels.shape, hidden.shape[-1] if hidden.dim() else 1), f"labels {tuple(labels.shape)}"),
        "weight": (weight, (*(vocab or (1,)), *hidden.shape[-1:]), f"hidden {tuple(hidden.shape)}"),
        "ref_hidden": (
            ref_hidden,
            (*labels.shape, ref_hidden.shape[-1] if ref_hidden.dim() else 1),
            f"labels {tuple(labels.shape)}",
        ),
        "ref_weight": (
            reference.weight,
            (*vocab, *ref_hidden.shape[-1:]),
            f"weight {tuple(weight.shape)} and ref_hidden {tuple(ref_hidden.shape)}",
        ),
        "bias": (policy.bias, (*vocab,), f"weight {tuple(weight.shape)}"),
        "ref_bias": (reference.bias, (*vocab,), f"weight {tuple(weight.shape)}"),
    }
    for name, (tensor, shape, beside) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} but {shape} is needed beside {beside}")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but hidden has {hidden.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if labels.device != hidden.device:
        raise ValueError(f"labels is on {labels.device} but hidden is on {hidden.device}")


def _sizes(inputs: FusedInputs, *, vocab: int, weight_gradient: bool) -> Sizes:
    """The planner's sizes, for `vocab` entries of the vocabulary."""
    needs_grad = torch.is_grad_enabled()
    return Sizes(
        vocab=vocab,
        width=inputs.policy.width,
        ref_width=inputs.reference.width,
        weight_bytes=inputs.weight_dtype.itemsize,
        logit_bytes=inputs.logit_dtype.itemsize,
        needs_grad=needs_grad,
        needs_weight_grad=needs_grad and weight_gradient,
    )
