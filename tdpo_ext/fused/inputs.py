"""What a fused loss reads: the two LM heads with their hidden states, the labels and the options, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..divergence import check_shard
from ..ops import operators
from ..ops.matmul import full_precision, product
from ..ops.operators import RowOptions
from ..vocab_parallel import Exchange, VocabShard, digest, local_tensors
from .options import FusedOptions
from .plan import resolved_budget
from .rows import Rows, Sequences
from .sizes import Sizes


@dataclass(frozen=True)
class LMHead:
    """Hidden states and the head that makes logits of them.

    Attributes:
        hidden: (..., D); flat, (N, D), once the inputs are prepared.
        weight: (V, D), of this rank's slice of the vocabulary.
        bias: (V,), or None.
        scale: the logits are multiplied by it.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0

    @property
    def width(self) -> int:
        return self.weight.shape[1]

    def cast(self, dtype: torch.dtype) -> LMHead:
        """The same in another precision."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def detach(self) -> LMHead:
        """The same without a graph."""
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias)

    def flat(self) -> LMHead:
        """With rows in one dimension: hidden (N, D)."""
        return replace(self, hidden=self.hidden.reshape(-1, self.hidden.shape[-1]))

    def logits(self, hidden: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Logits of some rows' hidden states over some columns, in the precision of `out`, which is returned."""
        with full_precision(hidden.device):
            product(hidden, self.weight[columns].t(), out)
        if self.bias is not None:
            out += self.bias[columns]
        return out if self.scale == 1 else out.mul_(self.scale)


@dataclass(frozen=True)
class GatheredRows:
    """Some rows side by side: hidden (n, D), ref_hidden (n, D_ref), labels (n,)."""

    hidden: Tensor
    ref_hidden: Tensor
    labels: Tensor


@dataclass(frozen=True)
class FusedInputs:
    """Both heads, flat and checked, over what this rank holds of the vocabulary.

    Attributes:
        policy, reference: widths and dtypes may differ. The reference carries no graph.
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
        """Of the policy's weights, hidden states and their gradients."""
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
        return self.exchange.merged_row_states(
            local_states, (rows,), self.logit_dtype, self.device, reverse_kl=self.options.reverse_kl
        )

    def merge(self, states: list[Tensor]) -> Tensor:
        """States of the same rows over several slices of the vocabulary, merged."""
        return operators.merge_row_states(torch.stack(states), reverse_kl=self.options.reverse_kl)

    def finalize(self, states: Tensor, labels: Tensor) -> Tensor:
        """Values of rows from their states, (fields, rows), in the order of TokenDivergence."""
        return operators.finalize_row_states(states, labels, self.options)


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
    "ref_bytes": "ref_hidden",
    "ignore_index": "ignore_index",
    "temperature": "temperature (or logit_scale)",
    "softcap": "softcap (or logit_scale)",
    "ref_scale": "ref_logit_scale",
    "reverse_kl": "kl_direction",
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
        options.check()
        budget = resolved_budget(options.logits_budget, policy.hidden.device)
        own, ref = _autocast(*_narrowed(policy, reference, shard))
        _check_heads(own, ref, labels)
        if shard is None and own.weight.shape[0] == 0:
            raise ValueError("weight has no rows: the vocabulary is empty")
        if own.weight.dtype == torch.float64:  # whose products take no other operands
            ref = ref.cast(torch.float64)
        inputs = FusedInputs(
            policy=own.flat(),
            reference=replace(ref.detach().flat(), scale=options.ref_logit_scale / options.logit_scale),
            labels=labels.reshape(-1),
            options=options.row_options(0 if shard is None else shard.start, own.weight.shape[0]),
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
            "ref_bytes": inputs.reference.weight.dtype.itemsize,
            "ignore_index": inputs.options.ignore_index,
            "temperature": inputs.options.temperature,
            "softcap": inputs.options.softcap,
            "ref_scale": inputs.reference.scale,
            "reverse_kl": inputs.options.reverse_kl,
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
        hidden_name, beside_dtype = ("ref_hidden", ref_hidden) if name.startswith("ref_") else ("hidden", hidden)
        if tensor.dtype != beside_dtype.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but {hidden_name} has {beside_dtype.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if ref_hidden.dtype == torch.float64 != hidden.dtype:
        raise TypeError(f"ref_hidden has dtype {ref_hidden.dtype} but hidden has {hidden.dtype}, which is less precise")
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
