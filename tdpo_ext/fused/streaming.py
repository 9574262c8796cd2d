"""The streaming plan: slices of the vocabulary whose row states are merged, logits recomputed in backward.

Pass 1 merges the states of every slice. Backward forms each slice's logits again, then dz, writes that slice's rows of
dW once and adds into a float32 dhidden. Rows without a gradient are dropped; rows whose KL has none (TDPO2's chosen
responses) skip the reference's product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..divergence import TokenDivergence
from ..ops import memory, operators
from ..ops.memory import Buffer
from .gradients import BiasGradient, Block, Gradients, PartialHiddenGradient, Wanted, WeightGradient, slices
from .inputs import FusedInputs
from .plan import StreamingPlan


def streamed_divergence(inputs: FusedInputs, index: Tensor, plan: StreamingPlan) -> Tensor:
    """Values (fields, N) of all rows, in the order of TokenDivergence, 0 at those not in `index`; differentiable."""
    policy = inputs.policy
    return _Streaming.apply(policy.hidden, policy.weight, policy.bias, inputs, index, plan)


class _Streaming(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, inputs: FusedInputs, index: Tensor, plan: StreamingPlan) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            states = _states(inputs, index, plan)
            counted = inputs.finalize(states, index)
        ctx.save_for_backward(hidden, weight, bias, index, states)
        ctx.inputs, ctx.plan = inputs, plan
        values = counted.new_zeros(len(counted), len(inputs.labels))
        return values.index_copy_(1, index, counted)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, values_grad: Tensor):
        *_, index, states = ctx.saved_tensors  # unpacking them detects inputs that were modified in place
        grads = TokenDivergence._make(values_grad[:, index].to(states.dtype))
        # Rows with a KL gradient come first; rows with no gradient at all are left out.
        with_kl, without_kl = grads.kl != 0, (grads.kl == 0) & (grads.logps != 0)
        order = torch.cat([with_kl.nonzero()[:, 0], without_kl.nonzero()[:, 0]])
        rows = _GradientRows(
            index=index[order],
            states=states[order],
            logps_grad=grads.logps[order],
            kl_grad=grads.kl[order],
            with_kl=int(with_kl.sum()),
        )
        with torch.autocast(index.device.type, enabled=False):
            dhidden, dweight, dbias = _gradients(ctx.inputs, rows, ctx.plan, Wanted._make(ctx.needs_input_grad[:3]))
        return dhidden, dweight, dbias, None, None, None


def _states(inputs: FusedInputs, index: Tensor, plan: StreamingPlan) -> Tensor:
    """Merged row states of the rows at `index`: (rows, state size)."""
    merged = torch.empty(len(index), operators.STATE_SIZE, dtype=inputs.logit_dtype, device=inputs.device)
    buffers = _Buffers.allocate(inputs, plan)
    for rows in slices(len(index), plan.rows):
        local_states = functools.partial(_states_of_block, inputs, index[rows], plan, buffers)
        merged[rows] = inputs.merge_over_ranks(index[rows], local_states)
    return merged


def _states_of_block(inputs: FusedInputs, rows: Tensor, plan: StreamingPlan, buffers: _Buffers) -> Tensor:
    """States of the rows at `rows` over what this rank holds of the vocabulary."""
    total = None
    for columns in _column_slices(inputs, plan):
        shape = (len(rows), columns.stop - columns.start)
        state = inputs.row_states(rows, columns, z=_view(buffers.z, shape), r=_view(buffers.r, shape))
        total = state if total is None else operators.merge_row_states(torch.stack([total, state]))
    return total


@dataclass(frozen=True)
class _GradientRows:
    """The rows that have a gradient, those with a KL gradient (`with_kl` of them) first.

    Attributes:
        index: positions among all rows, (n,).
        states: of the whole vocabulary, (n, state size).
        logps_grad, kl_grad: dL/dlogps and dL/dkl, (n,).
    """

    index: Tensor
    states: Tensor
    logps_grad: Tensor
    kl_grad: Tensor
    with_kl: int

    def blocks(self, size: int) -> list[slice]:
        """At most `size` rows at a time; no block has rows both with and without a KL gradient."""
        rest = slices(len(self.index) - self.with_kl, size)
        return slices(self.with_kl, size) + [slice(self.with_kl + b.start, self.with_kl + b.stop) for b in rest]


@dataclass(frozen=True)
class _Buffers:
    """Scratch memory for a block: both logits, dz (`z` itself where it has its dtype), and a slice of dW's sum."""

    z: Tensor
    r: Tensor
    dz: Tensor
    weight_sum: Tensor | None

    @classmethod
    def allocate(cls, inputs: FusedInputs, plan: StreamingPlan, *, dz: bool = False, weight_sum: bool = False):
        entries = (plan.rows * plan.columns,)
        logits = Buffer(entries, inputs.logit_dtype)
        wanted = {
            "z": logits,
            "r": logits,
            "dz": Buffer(entries, inputs.weight_dtype) if dz else None,
            "weight_sum": Buffer((plan.columns, inputs.policy.width), inputs.logit_dtype) if weight_sum else None,
        }
        found = memory.allocate(inputs.device, wanted)
        z = found["z"]
        return cls(z=z, r=found["r"], dz=found.get("dz", z), weight_sum=found.get("weight_sum"))


def _gradients(inputs: FusedInputs, rows: _GradientRows, plan: StreamingPlan, wanted: Wanted):
    """dhidden, dW and dbias."""
    blocks = rows.blocks(plan.rows)
    low_precision = inputs.weight_dtype != inputs.logit_dtype
    # A slice of a low-precision dW that several blocks add to is summed in float32 first.
    sums_weight = wanted.weight and low_precision and len(blocks) > 1
    buffers = _Buffers.allocate(inputs, plan, dz=low_precision, weight_sum=sums_weight)
    hidden_gradient = PartialHiddenGradient(inputs, rows.index) if wanted.hidden else None
    gradients = Gradients(
        hidden=hidden_gradient,
        weight=WeightGradient(inputs, buffers.weight_sum) if wanted.weight else None,
        bias=BiasGradient(inputs) if wanted.bias else None,
    )
    if gradients.any:
        try:
            for block, dz in _dz_blocks(inputs, rows, blocks, plan, buffers):
                gradients.add(block, inputs.policy.hidden[rows.index[block.rows]], dz)
        except Exception as error:
            if hidden_gradient is None:
                raise
            hidden_gradient.fail(blocks, error)
    return gradients.finish()


def _dz_blocks(
    inputs: FusedInputs, rows: _GradientRows, blocks: list[slice], plan: StreamingPlan, buffers: _Buffers
) -> Iterator[tuple[Block, Tensor]]:
    """Every block of rows over every slice of the vocabulary, with its dz, recomputed."""
    for columns in _column_slices(inputs, plan):
        for block in blocks:
            index, shape = rows.index[block], (block.stop - block.start, columns.stop - columns.start)
            z = inputs.policy.logits(index, columns, out=_view(buffers.z, shape))
            r = z  # not read where the KL has no gradient
            if block.start < rows.with_kl:
                r = inputs.reference.logits(index, columns, out=_view(buffers.r, shape))
            dz = _view(buffers.dz, shape)
            operators.logit_gradient_out(
                z,
                r,
                inputs.labels[index],
                rows.states[block],
                logps_grad=rows.logps_grad[block],
                kl_grad=rows.kl_grad[block],
                options=inputs.options.from_column(columns.start),
                out=dz,
            )
            yield Block(block, columns), dz


def _column_slices(inputs: FusedInputs, plan: StreamingPlan) -> list[slice]:
    """The slices of this rank's vocabulary; a rank that holds none of it takes part with an empty one."""
    return slices(inputs.vocab, plan.columns) or [slice(0, 0)]


def _view(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    return buffer[: shape[0] * shape[1]].view(shape)
