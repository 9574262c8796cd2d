"""What a fused loss reads: both heads with their hidden states, the labels and the options, checked and agreed on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import checks
from ..divergence import check_shard
from ..ops import operators
from ..ops.operators import RowOptions
from ..vocab_parallel import Exchange, Fact, VocabShard, digest, row_digest
from . import half
from .heads import CallTensors
from .options import FusedOptions
from .planning.plan import resolved_budget
from .planning.sizes import Sizes
from .rows import Rows, Sequences, reading_is_free

# Entries that torch's products in tiles (AMX) may read behind a row of dz, against zeros, of which a NaN makes NaN.
_READ_BEHIND = 64
# ref_logps and kl, among the fields of TokenDivergence; and kl alone.
_REFERENCE_FIELDS, _KL = slice(1, 3), 2


@dataclass(frozen=True)
class GatheredRows:
    """Some rows side by side: hidden (n, D), ref_hidden (n, D_ref), labels (n,)."""

    hidden: Tensor
    ref_hidden: Tensor
    labels: Tensor


@dataclass(frozen=True, kw_only=True)
class FusedInputs(CallTensors):
    """The tensors of a call, flat and checked, over what this rank holds of the vocabulary; the reference has no graph.

    Attributes:
        options: for the kernels; column 0 is the heads' first row.
        exchange: with the other ranks, where the vocabulary is sharded.
    """

    options: RowOptions
    exchange: Exchange

    @property
    def vocab(self) -> int:
        """Entries of the vocabulary that this rank holds."""
        return self.head.vocab

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the policy's weights, hidden states and their gradients."""
        return self.head.dtype

    @property
    def logit_dtype(self) -> torch.dtype:
        """Of the logits and of everything that is accumulated."""
        return operators.state_dtype(self.weight_dtype)

    @property
    def dz_in_place(self) -> bool:
        """Whether dz can be written over the logits of its rows."""
        return self.weight_dtype == self.logit_dtype or self.device.type == "cpu"

    def dz_over(self, z: Tensor) -> Tensor:
        """Memory for dz in that of the logits, (rows, columns)."""
        return z if z.dtype == self.weight_dtype else operators.narrowed(z, self.weight_dtype)

    @property
    def is_half(self) -> bool:
        """Whether dz and the gradients are float16, whose rows then have scales of their own (`half`)."""
        return self.weight_dtype == torch.float16

    @property
    def ref_width(self) -> int:
        """Of the reference's hidden states; 0 without a reference."""
        return self.ref_head.width if self.has_reference else 0

    @property
    def wants_hidden_gradient_alone(self) -> bool:
        """Whether head and bias are frozen, and the vocabulary is not sharded."""
        frozen = not self.head.trained_width and (self.head.bias is None or not self.head.bias.requires_grad)
        return frozen and self.exchange.shard is None

    @property
    def sums_hidden_grad(self) -> bool:
        """Whether dhidden is summed over the ranks of a shard."""
        return self.exchange.shard is not None and self.exchange.shard.sum_hidden_grad

    def rows_at(self, index: Tensor, labels: Tensor) -> GatheredRows:
        """The rows at `index`, whose labels are `labels`.

        Of rows that are ignored and not dropped, the hidden states are 0: what they hold (NaN, perhaps) reaches no sum.
        """
        hidden, ref_hidden = self.hidden[index], self.ref_hidden[index]
        if not reading_is_free(index.device):
            ignored = (labels == self.options.ignore_index)[:, None]
            hidden, ref_hidden = hidden.masked_fill_(ignored, 0), ref_hidden.masked_fill_(ignored, 0)
        return GatheredRows(hidden, ref_hidden, labels)

    def row_states(self, rows: GatheredRows, columns: slice, *, z: Tensor, r: Tensor) -> Tensor:
        """States of some rows over some columns; leaves the logits in `z` and `r`, (rows, columns).

        Without a reference `r` is `z`: the policy is compared with itself.
        """
        self.head.logits(rows.hidden, columns, out=z)
        if self.has_reference:
            self.ref_head.logits(rows.ref_hidden, columns, out=r)
        return operators.row_states(z, r, rows.labels, self.options.from_column(columns.start))

    def write_dz(
        self,
        z: Tensor,
        r: Tensor,
        labels: Tensor,
        states: Tensor,
        *,
        logps_grad: Tensor,
        kl_grad: Tensor,
        first_column: int,
        out: Tensor,
    ) -> None:
        """dz of some rows from their logits over some columns, (rows, columns), written into `out`."""
        operators.logit_gradient_out(
            z,
            r,
            labels,
            states,
            logps_grad=logps_grad,
            kl_grad=kl_grad,
            options=self.options.from_column(first_column),
            out=out,
        )
        columns = out.shape[1]
        if out.dtype != z.dtype and out.data_ptr() == z.data_ptr() and columns % _READ_BEHIND:
            z.view(out.dtype)[:, columns : columns + _READ_BEHIND - columns % _READ_BEHIND] = 0

    def merge_over_ranks(self, rows: int, local_states: Callable[[], Tensor]) -> Tensor:
        """The states that `local_states` computes of `rows` rows over this rank's vocabulary, merged over all ranks."""
        return self.exchange.merged_row_states(
            local_states, (rows,), self.logit_dtype, self.device, reverse_kl=self.options.reverse_kl
        )

    def compare_over_ranks(self, loss: Tensor, *gradients: Tensor) -> None:
        """The loss of some pairs must be the same on every rank and, where all want dhidden, so must its gradients."""
        if self.exchange.shard is not None:
            values = (loss, *gradients) if self.hidden.requires_grad else (loss,)
            self.exchange.compare(torch.cat([value.detach().reshape(-1).double() for value in values]))

    def merge(self, states: list[Tensor]) -> Tensor:
        """States of the same rows over several slices of the vocabulary, merged."""
        return operators.merge_row_states(torch.stack(states), reverse_kl=self.options.reverse_kl)

    def finalize(self, states: Tensor, labels: Tensor) -> Tensor:
        """Values of rows from their states, (fields, rows), in the order of TokenDivergence.

        Those of a reference are NaN at the rows that count where there is none.
        """
        values = operators.finalize_row_states(states, labels, self.options)
        if not self.has_reference:
            values[_REFERENCE_FIELDS].masked_fill_(labels != self.options.ignore_index, torch.nan)
        return values

    def dz_scales(self, logps_grad: Tensor, kl_grad: Tensor, values: Tensor) -> Tensor:
        """What the upstream gradients of rows, whose values are (fields, rows), are multiplied by in float16."""
        return half.dz_scales(logps_grad, kl_grad, values[_KL], self.options)


@dataclass(frozen=True)
class PlanInputs:
    """What the planner decides by; the same on every rank of a shard.

    Attributes:
        budget: bytes that temporaries may take.
    """

    sizes: Sizes
    budget: int


def prepare(
    tensors: CallTensors,
    sequences: Sequences,
    options: FusedOptions,
    check_objective: Callable[[], list[Fact]] = list,
) -> tuple[FusedInputs, Rows, PlanInputs]:
    """Checks and flattens the arguments of a fused loss, and agrees on them with the other ranks of a shard.

    Args:
        check_objective: checks what a preference loss takes beside these, and tells what ranks must share of it.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range; the message names it.
        RuntimeError: another rank failed; the message is that rank's.
    """
    tensors.check_types()
    check_shard(options.shard)
    given = tensors
    tensors, dtensor_shard = tensors.local()
    shard = options.shard if options.shard is not None else dtensor_shard

    def checked() -> tuple[tuple[FusedInputs, Rows, int], list[Fact]]:
        facts = check_objective()
        options.check()
        if not given.has_reference:
            options.check_without_reference()
        given.check_replicated(shard)
        budget = resolved_budget(options.logits_budget, tensors.hidden.device)
        inputs = _checked_inputs(tensors, options, shard)
        rows = sequences.rows(tensors.labels, options.ignore_index)
        return (inputs, rows, budget), facts

    if shard is None:
        (inputs, rows, budget), _ = checked()
        return inputs, rows, PlanInputs(_sizes(inputs, inputs.vocab, inputs.head.trained_width), budget)

    def checked_with_facts() -> tuple[tuple[FusedInputs, Rows, int], list[Fact]]:
        (inputs, rows, budget), facts = checked()
        return (inputs, rows, budget), [*_facts(inputs, rows, budget), *facts]

    (inputs, rows, _), ranks = shard.agree(tensors.hidden.device, checked_with_facts)
    inputs = replace(inputs, options=replace(inputs.options, vocab_size=ranks.vocab_size))
    # One plan for all ranks: that of the widest shard, the smallest budget, and a gradient if any rank wants its.
    sizes = _sizes(inputs, max(ranks.by_rank["vocab"]), max(ranks.by_rank["trained width"]))
    return inputs, rows, PlanInputs(sizes, min(ranks.by_rank["budget"]))


def _checked_inputs(tensors: CallTensors, options: FusedOptions, shard: VocabShard | None) -> FusedInputs:
    tensors = (tensors if shard is None else tensors.narrowed(shard)).autocast()
    tensors.check_shapes()
    vocab = tensors.head.vocab
    if shard is None and vocab == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if tensors.hidden.dtype == torch.float64:  # float64 products take float64 operands only
        tensors = tensors.cast_reference(torch.float64)
    ref_head = tensors.ref_head.detach()
    return FusedInputs(
        hidden=tensors.hidden.reshape(-1, tensors.head.width),
        head=tensors.head,
        ref_hidden=tensors.ref_hidden.detach().reshape(-1, ref_head.width),
        ref_head=replace(ref_head, scale=options.ref_logit_scale / options.logit_scale),
        labels=tensors.labels.reshape(-1),
        options=options.row_options(0 if shard is None else shard.start, vocab),
        exchange=Exchange(shard),
        has_reference=tensors.has_reference,
    )


def _facts(inputs: FusedInputs, rows: Rows, budget: int) -> list[Fact]:
    """What the ranks of a shard tell each other; of all but the first three they must agree."""
    options = inputs.options
    return [
        Fact("vocab", inputs.vocab),
        Fact("budget", budget),
        Fact("trained width", inputs.head.trained_width),
        Fact("rows", len(rows.index), "labels"),
        Fact("labels", digest(inputs.labels[rows.index]), "labels"),
        Fact("lengths", digest(rows.lengths_on_device), "labels (or cu_seqlens)"),
        Fact("bytes", inputs.weight_dtype.itemsize, "weight"),
        Fact("width", inputs.head.width, "hidden"),
        Fact("parts", len(inputs.head.weights), "weight"),
        Fact("ref_width", inputs.ref_width, "ref_hidden"),
        Fact("ref_bytes", inputs.ref_head.dtype.itemsize, "ref_hidden"),
        Fact("ignore_index", options.ignore_index, "ignore_index"),
        Fact("temperature", options.temperature, "temperature (or logit_scale)"),
        Fact("softcap", options.softcap, "softcap (or logit_scale)"),
        Fact("ref_scale", inputs.ref_head.scale, "ref_logit_scale"),
        Fact("reverse_kl", options.reverse_kl, "kl_direction"),
        Fact("grad mode", torch.is_grad_enabled(), "torch.is_grad_enabled()"),
        Fact("hidden gradient", inputs.hidden.requires_grad, "hidden.requires_grad"),
        Fact("sum_hidden_grad", inputs.sums_hidden_grad, "shard"),
        Fact("hidden", digest(row_digest(inputs.hidden)[rows.index]), "hidden"),
        Fact("ref_hidden", digest(row_digest(inputs.ref_hidden)[rows.index]), "ref_hidden"),
    ]


def check_columns(columns: Mapping[str, Tensor], labels: Tensor) -> None:
    """Raises ValueError or TypeError where a column is no floating-point tensor of the labels' shape and device."""
    for name, column in columns.items():
        checks.float_tensor(f"token_columns[{name!r}]", column)
        if column.shape != labels.shape or column.device != labels.device:
            raise ValueError(
                f"token_columns[{name!r}] has shape {tuple(column.shape)} on {column.device}; that of labels, "
                f"{tuple(labels.shape)} on {labels.device}, is needed"
            )


def _sizes(inputs: FusedInputs, vocab: int, trained_width: int) -> Sizes:
    """The planner's sizes, for `vocab` entries of the vocabulary."""
    needs_grad = torch.is_grad_enabled()
    return Sizes(
        vocab=vocab,
        width=inputs.head.width,
        ref_width=inputs.ref_width,
        weight_bytes=inputs.weight_dtype.itemsize,
        logit_bytes=inputs.logit_dtype.itemsize,
        is_half=inputs.is_half,
        needs_grad=needs_grad,
        needs_weight_grad=needs_grad and trained_width > 0,
        trained_width=trained_width or None,
        dz_in_place=inputs.dz_in_place,
    )
