"""What a fused loss reads: the two LM heads with their hidden states, the labels and the options, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..divergence import check_options
from ..ops import operators
from ..ops.matmul import product
from ..ops.operators import RowOptions
from ..vocab_parallel import VocabShard, local_tensors, merged_row_states
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

    def logits(self, rows: Tensor, columns: slice, out: Tensor) -> Tensor:
        """Logits of the rows at `rows` over some columns, in the precision of `out`, which is returned."""
        product(self.hidden[rows], self.weight[columns].t(), out)
        if self.bias is not None:
            out += self.bias[columns]
        return out


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
        shard: how the vocabulary is sharded, if it is.
    """

    policy: LMHead
    reference: LMHead
    labels: Tensor
    options: RowOptions
    shard: VocabShard | None

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
    def hidden_grad_shard(self) -> VocabShard | None:
        """The shard over whose ranks dhidden is summed, if it is."""
        return self.shard if self.shard is not None and self.shard.sum_hidden_grad else None

    def row_states(self, rows: Tensor, columns: slice, z: Tensor, r: Tensor) -> Tensor:
        """States of the rows at `rows` over some columns; leaves the logits in `z` and `r`, (rows, columns)."""
        self.policy.logits(rows, columns, out=z)
        self.reference.logits(rows, columns, out=r)
        return operators.row_states(z, r, self.labels[rows], self.options.from_column(columns.start))

    def merge_over_ranks(self, rows: Tensor, local_states) -> Tensor:
        """The states that `local_states()` computes of `rows` over this rank's vocabulary, merged over all ranks."""
        return merged_row_states(self.shard, local_states, tuple(rows.shape), self.logit_dtype, self.device)

    def finalize(self, states: Tensor, rows: Tensor) -> Tensor:
        """Values of rows from their states, (fields, rows), in the order of TokenDivergence."""
        return operators.finalize_row_states(
            states,
            self.labels[rows],
            ignore_index=self.options.ignore_index,
            temperature=self.options.temperature,
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


def prepare(
    policy: LMHead, reference: LMHead, labels: Tensor, sequences: Sequences, options: FusedOptions
) -> FusedCall:
    """Checks and flattens the arguments of a fused loss, and agrees on them with the other ranks of a shard.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range; the message names it.
        RuntimeError: another rank failed; the message is that rank's.
    """
    policy, reference, labels, dtensor_shard = _local_heads(policy, reference, labels)
    shard = options.shard or dtensor_shard

    def checked() -> tuple[tuple[FusedInputs, Rows, int], dict[str, int]]:
        check_options(options.temperature, options.softcap)
        budget = resolved_budget(options.logits_budget, policy.hidden.device)
        heads = _narrowed(policy, reference, shard)
        heads = _autocast(*heads)
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
            shard=shard,
        )
        rows = sequences.rows(labels, options.ignore_index)
        facts = {
            "rows": len(rows.index),
            "vocab": inputs.vocab,
            "budget": budget,
            "bytes": inputs.weight_dtype.itemsize,
        }
        return (inputs, rows, budget), facts

    if shard is None:
        (inputs, rows, budget), _ = checked()
        return FusedCall(inputs, rows, _sizes(inputs, inputs.vocab), budget)
    (inputs, rows, _), ranks = shard.agree(policy.hidden.device, checked)
    ranks.check_same("rows", "labels")
    ranks.check_same("bytes", "weight")
    inputs = replace(inputs, options=replace(inputs.options, vocab_size=ranks.vocab_size))
    # One plan for all ranks: that of the widest shard and the smallest budget.
    return FusedCall(inputs, rows, _sizes(inputs, max(ranks.by_rank["vocab"])), min(ranks.by_rank["budget"]))


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


def _check_heads(policy: LMHead, reference: LMHead, labels: Tensor) -> None:
    """Raises ValueError or TypeError naming the first argument whose shape, dtype or device doesn't fit."""
    hidden, weight, ref_hidden = policy.hidden, policy.weight, reference.hidden
    expected = {
        "hidden": (hidden, (*labels.shape, hidden.shape[-1] if hidden.dim() else 1)),
        "weight": (weight, (weight.shape[0] if weight.dim() else 1, *hidden.shape[-1:])),
        "ref_hidden": (ref_hidden, (*labels.shape, ref_hidden.shape[-1] if ref_hidden.dim() else 1)),
        "ref_weight": (reference.weight, (*weight.shape[:1], *ref_hidden.shape[-1:])),
        "bias": (policy.bias, (*weight.shape[:1],)),
        "ref_bias": (reference.bias, (*weight.shape[:1],)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} but {shape} is needed")
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise TypeError(f"{name} has dtype {tensor.dtype}; allowed are float32, bfloat16, float16 and float64")
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype} but hidden has {hidden.dtype}")
        if tensor.device != hidden.device:
            raise ValueError(f"{name} is on {tensor.device} but hidden is on {hidden.device}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels has dtype {labels.dtype} but torch.int64 is needed")
    if labels.device != hidden.device:
        raise ValueError(f"labels is on {labels.device} but hidden is on {hidden.device}")


def _sizes(inputs: FusedInputs, vocab: int) -> Sizes:
    """The planner's sizes, for `vocab` entries of the vocabulary."""
    needs_grad = torch.is_grad_enabled()
    return Sizes(
        vocab=vocab,
        width=inputs.policy.width,
        ref_width=inputs.reference.width,
        weight_bytes=inputs.weight_dtype.itemsize,
        logit_bytes=inputs.logit_dtype.itemsize,
        needs_grad=needs_grad,
        needs_weight_grad=needs_grad and inputs.policy.weight.requires_grad,
    )
