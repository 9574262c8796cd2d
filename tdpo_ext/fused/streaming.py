"""The streaming plan: slices of the vocabulary whose row states are merged, logits recomputed for the gradients.

Pass 1 merges the states of every slice. Pass 2 forms each slice's logits again, then dz, writes that slice's rows of dW
once and adds into a float32 dhidden. Rows whose KL has no gradient (TDPO2's chosen responses) skip the reference's
product. Where the host can look without waiting for the device, rows without any gradient are dropped too.

A preference loss takes both passes in the forward pass; per-token values take the second in backward.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..derivatives import once, save, saved
from ..divergence import TokenDivergence
from ..ops import memory, operators
from ..ops.memory import Buffer
from ..vocab_parallel import Exchange, Fact, digest
from .blocks import NO_FACTORS, Block, Factors, slices
from .gradients import BiasGradient, Gradients, PartialHiddenGradient, Wanted
from .heads import Head
from .inputs import FusedInputs, GatheredRows
from .pair_loss import Outcome, PairLoss, column_gradient
from .planning.plan import StreamingPlan
from .planning.sizes import row_pitch
from .rows import reading_is_free
from .stored import StoredGradient
from .weight_gradient import WeightGradient


def streamed_loss(loss: PairLoss, plan: StreamingPlan, wanted: Wanted, wanted_columns: frozenset[str]) -> Outcome:
    """Loss, sums and gradients of a batch of pairs: both passes."""
    inputs = loss.inputs
    chunked = loss.rows.in_chunks([range(loss.rows.pairs)])
    index, (chunk,) = chunked.index, chunked.chunks
    buffers = _Buffers.allocate(inputs, plan, wanted)
    states = _states(inputs, index, plan, buffers)
    values = inputs.finalize(states, inputs.labels[index])
    columns = {name: column.detach()[index] for name, column in loss.columns.items()}
    objective = loss.pair_objective(wanted, wanted_columns)
    upstream = inputs.exchange.run(
        lambda: objective.upstream(values, chunk, columns), lambda: objective.nothing(values, chunk)
    )
    inputs.compare_over_ranks(upstream.loss, upstream.logps_grad, upstream.kl_grad)
    gradients: tuple[StoredGradient | None, ...] = (None, None, *[None] * len(wanted.weights))
    if wanted.any:
        gradient_rows = _GradientRows.ordered(
            inputs,
            index,
            states,
            logps_grad=upstream.logps_grad,
            kl_grad=upstream.kl_grad,
            groups=list(zip(chunk.side_rows, upstream.kl_of_sides)),
        )
        gradients = _gradients(inputs, gradient_rows, plan, wanted, buffers)
    return Outcome(
        loss=upstream.loss,
        sides=upstream.sums.chunk(chunk.sides, dim=1),
        gradients=gradients,
        column_gradients={
            name: column_gradient(loss.columns[name], index, grad) for name, grad in upstream.columns_grad.items()
        },
    )


def streamed_divergence(inputs: FusedInputs, index: Tensor, plan: StreamingPlan) -> TokenDivergence:
    """Values (N,) of all rows, 0 at those not in `index`; differentiable."""
    call = _Call(inputs, index, plan)
    logps, kl, others = _TokenValues.apply(call, inputs.hidden, inputs.head.bias, *inputs.head.weights)
    ref_logps, entropy, correct, tokens = others.unbind(0)
    return TokenDivergence(logps=logps, ref_logps=ref_logps, kl=kl, entropy=entropy, correct=correct, tokens=tokens)


class _Call(NamedTuple):
    """What `_TokenValues` takes beside the leaves: all that is read, the rows that count, and a plan for them."""

    inputs: FusedInputs
    rows: Tensor
    plan: StreamingPlan


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, *leaves: Tensor | None):
        inputs, index, plan = call
        labels, ref_head = inputs.labels, inputs.ref_head
        with torch.autocast(inputs.device.type, enabled=False):
            # As large as those of the backward pass, which finds their memory again.
            buffers = _Buffers.allocate(inputs, plan, Wanted.of_leaves(ctx.needs_input_grad[1:], inputs.head))
            states = _states(inputs, index, plan, buffers)
            counted = inputs.finalize(states, labels[index])
        save(ctx, *leaves, inputs.ref_hidden, ref_head.bias, *ref_head.weights, labels, index, states)
        inputs.exchange.finish(inputs.device)
        ctx.options, ctx.ref_scale, ctx.parts = inputs.options, ref_head.scale, len(leaves) - 2
        ctx.shard, ctx.plan, ctx.has_reference = inputs.exchange.shard, plan, inputs.has_reference
        ctx.set_materialize_grads(False)
        of_all_rows = counted.new_zeros(len(counted), len(labels)).index_copy_(1, index, counted)
        values = TokenDivergence._make(of_all_rows.unbind(0))
        others = torch.stack([values.ref_logps, values.entropy, values.correct, values.tokens])
        kl = values.kl.clone()
        ctx.mark_non_differentiable(others, *([] if inputs.has_reference else [kl]))
        return values.logps.clone(), kl, others

    @staticmethod
    def backward(ctx, logps_grad: Tensor | None, kl_grad: Tensor | None, _others_grad):
        # Detects inputs that were modified in place since.
        hidden, bias, *others, labels, index, states = saved(ctx)
        weights, (ref_hidden, ref_bias, *ref_weights) = others[: ctx.parts], others[ctx.parts :]
        inputs = FusedInputs(
            hidden=hidden,
            head=Head(tuple(weights), bias),
            ref_hidden=ref_hidden,
            ref_head=Head(tuple(ref_weights), ref_bias, ctx.ref_scale),
            labels=labels,
            options=ctx.options,
            exchange=Exchange(ctx.shard),
            has_reference=ctx.has_reference,
        )
        nothing = states.new_zeros(len(index))
        rows = _GradientRows.ordered(
            inputs,
            index,
            states,
            logps_grad=nothing if logps_grad is None else logps_grad[index].to(states.dtype),
            kl_grad=nothing if kl_grad is None else kl_grad[index].to(states.dtype),
            groups=[(slice(0, len(index)), kl_grad is not None)],
        )
        _agree_on_gradients(inputs, rows)
        with torch.no_grad(), torch.autocast(index.device.type, enabled=False):
            wanted = Wanted.of_leaves(ctx.needs_input_grad[1:], inputs.head)
            stored = _gradients(inputs, rows, ctx.plan, wanted, _Buffers.allocate(inputs, ctx.plan, wanted))
            one = states.new_ones(())
            gradients = [None if gradient is None else gradient.rounded(one) for gradient in stored]
        inputs.exchange.finish(inputs.device)
        depend_on = (hidden, bias, *weights, logps_grad, kl_grad)
        return (None, *once("linear_token_divergence", gradients, depend_on))


def _agree_on_gradients(inputs: FusedInputs, rows: _GradientRows) -> None:
    """Raises ValueError on all ranks of a shard where they differentiate different functions of the values."""
    shard = inputs.exchange.shard
    if shard is not None:
        upstream = Fact("digest", digest(torch.stack([rows.logps_grad, rows.kl_grad])), "the gradient of the values")
        shard.agree(inputs.device, lambda: (None, [upstream]))


def _states(inputs: FusedInputs, index: Tensor, plan: StreamingPlan, buffers: _Buffers) -> Tensor:
    """Merged row states of the rows at `index`: (rows, state size)."""
    merged = torch.empty(len(index), operators.STATE_SIZE, dtype=inputs.logit_dtype, device=inputs.device)
    for rows in slices(len(index), plan.rows):
        local_states = functools.partial(_states_of_block, inputs, index[rows], plan, buffers)
        merged[rows] = inputs.merge_over_ranks(rows.stop - rows.start, local_states)
    return merged


def _states_of_block(inputs: FusedInputs, index: Tensor, plan: StreamingPlan, buffers: _Buffers) -> Tensor:
    """States of the rows at `index` over what this rank holds of the vocabulary."""
    rows = inputs.rows_at(index, inputs.labels[index])

    def states_over(columns: slice) -> Tensor:
        z, r = buffers.z_of(len(index), columns), buffers.r_of(len(index), columns)
        return inputs.row_states(rows, columns, z=z, r=r)

    first, *others = _column_slices(inputs, plan)
    total = states_over(first)
    for columns in others:
        total = inputs.merge([total, states_over(columns)])
    return total


@dataclass(frozen=True)
class _GradientRows:
    """The rows that may have a gradient, those with a KL gradient (`with_kl` of them) first.

    Attributes:
        index: positions among all rows, (n,).
        states: of the whole vocabulary, (n, state size).
        logps_grad, kl_grad: dL/dlogps and dL/dkl, (n,), times `scale`.
        scale: (n,), in float16 (`half`); else None.
    """

    index: Tensor
    states: Tensor
    logps_grad: Tensor
    kl_grad: Tensor
    with_kl: int
    scale: Tensor | None

    @classmethod
    def ordered(
        cls,
        inputs: FusedInputs,
        index: Tensor,
        states: Tensor,
        *,
        logps_grad: Tensor,
        kl_grad: Tensor,
        groups: list[tuple[slice, bool]],
    ) -> _GradientRows:
        """`groups` cover all rows; the host knows of each whether its KL may have a gradient.

        Ranks of a shard exchange rows, so that they drop none.
        """
        if inputs.exchange.shard is None and reading_is_free(index.device):
            has_kl, has_logps = kl_grad != 0, (kl_grad == 0) & (logps_grad != 0)
            order = torch.cat([has_kl.nonzero()[:, 0], has_logps.nonzero()[:, 0]])
            with_kl = int(has_kl.sum())
        else:
            kl_first = sorted(groups, key=lambda group: not group[1])
            order = torch.cat([torch.arange(rows.start, rows.stop, device=index.device) for rows, _ in kl_first])
            with_kl = sum(rows.stop - rows.start for rows, may_have_kl in groups if may_have_kl)
        index, states, logps_grad, kl_grad = index[order], states[order], logps_grad[order], kl_grad[order]
        scale = None
        if inputs.is_half:
            scale = inputs.dz_scales(logps_grad, kl_grad, inputs.finalize(states, inputs.labels[index]))
            logps_grad, kl_grad = logps_grad * scale, kl_grad * scale
        return cls(index, states, logps_grad, kl_grad, with_kl, scale)

    def factors(self, rows: slice | Tensor = slice(None)) -> Factors:
        """What dz of some of the rows lacks."""
        if self.scale is None:
            return NO_FACTORS
        scale = self.scale[rows]
        return Factors([(len(scale), 1 / scale[:, None])])

    def blocks(self, size: int) -> list[slice]:
        """At most `size` rows at a time; no block has rows both with and without a KL gradient."""
        rest = slices(len(self.index) - self.with_kl, size)
        return slices(self.with_kl, size) + [slice(self.with_kl + b.start, self.with_kl + b.stop) for b in rest]


@dataclass(frozen=True)
class _Buffers:
    """Scratch memory of both passes for a block: both logits, dz (in the memory of `z` where it can be), and the
    float32 sums of a slice of a low-precision dW, of each part of the head that wants a gradient, by its place."""

    z: Tensor
    r: Tensor
    dz: Tensor
    weight_sums: dict[int, Tensor]

    @classmethod
    def allocate(cls, inputs: FusedInputs, plan: StreamingPlan, wanted: Wanted) -> _Buffers:
        sums: dict[int, Buffer] = {}
        if inputs.weight_dtype != inputs.logit_dtype:
            sums = wanted.buffers(inputs.head, plan.columns, inputs.logit_dtype)
        shape, pitch = (plan.rows, plan.columns), row_pitch(plan.columns)
        logits = Buffer(shape, inputs.logit_dtype, pitch)
        found = memory.allocate(
            inputs.device,
            {
                "z": logits,
                "r": logits if inputs.has_reference else None,
                "dz": Buffer(shape, inputs.weight_dtype, pitch) if wanted.any and not inputs.dz_in_place else None,
                **{f"part {part}": buffer for part, buffer in sums.items()},
            },
            plan.budget,
        )
        z = found["z"]
        return cls(
            z=z,
            r=found.get("r", z),
            dz=found["dz"] if "dz" in found else inputs.dz_over(z),
            weight_sums={part: found[f"part {part}"] for part in sums},
        )

    def z_of(self, rows: int, columns: slice) -> Tensor:
        return self.z[:rows, : columns.stop - columns.start]

    def r_of(self, rows: int, columns: slice) -> Tensor:
        return self.r[:rows, : columns.stop - columns.start]

    def dz_of(self, rows: int, columns: slice) -> Tensor:
        return self.dz[:rows, : columns.stop - columns.start]


def _gradients(
    inputs: FusedInputs, rows: _GradientRows, plan: StreamingPlan, wanted: Wanted, buffers: _Buffers
) -> tuple[StoredGradient | None, ...]:
    """dhidden, dbias, and dW of each part of the head."""
    blocks = rows.blocks(plan.rows)
    # Where several blocks add to a slice of dW.
    weight_sums = buffers.weight_sums if len(blocks) > 1 or inputs.is_half else {}
    gradients = Gradients(
        hidden=PartialHiddenGradient(inputs, rows.index, rows.factors()) if wanted.hidden else None,
        bias=BiasGradient(inputs) if wanted.bias else None,
        weights=[
            WeightGradient(weight, weight_sums.get(part)) if needed else None
            for part, (weight, needed) in enumerate(zip(inputs.head.weights, wanted.weights))
        ],
        widths=inputs.head.widths,
    )
    if wanted.any:
        for block, hidden, dz in _dz_blocks(inputs, rows, blocks, plan, buffers):
            gradients.add(block, hidden, dz, rows.factors(block.rows))
    return gradients.finish()


def _dz_blocks(
    inputs: FusedInputs, rows: _GradientRows, blocks: list[slice], plan: StreamingPlan, buffers: _Buffers
) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Every block of rows over every slice of the vocabulary, with its hidden states and its dz, recomputed."""
    for columns in _column_slices(inputs, plan):
        for block in blocks:
            index = rows.index[block]
            gathered = inputs.rows_at(index, inputs.labels[index])
            dz = buffers.dz_of(len(index), columns)
            inputs.exchange.run(
                functools.partial(_form_dz, inputs, rows, block, columns, gathered, buffers), lambda: None
            )
            yield Block(block, columns), gathered.hidden, dz


def _form_dz(
    inputs: FusedInputs,
    rows: _GradientRows,
    block: slice,
    columns: slice,
    gathered: GatheredRows,
    buffers: _Buffers,
) -> None:
    """Recomputes a block's logits and writes dz into its buffer."""
    count = block.stop - block.start
    z = inputs.head.logits(gathered.hidden, columns, out=buffers.z_of(count, columns))
    r = z  # not read where the KL has no gradient
    if block.start < rows.with_kl:
        r = inputs.ref_head.logits(gathered.ref_hidden, columns, out=buffers.r_of(count, columns))
    inputs.write_dz(
        z,
        r,
        gathered.labels,
        rows.states[block],
        logps_grad=rows.logps_grad[block],
        kl_grad=rows.kl_grad[block],
        first_column=columns.start,
        out=buffers.dz_of(count, columns),
    )


def _column_slices(inputs: FusedInputs, plan: StreamingPlan) -> list[slice]:
    """The slices of this rank's vocabulary; a rank that holds none of it takes part with an empty one."""
    return slices(inputs.vocab, plan.columns) or [slice(0, 0)]
