"""The streaming plan: slices of the vocabulary whose row states are merged, logits recomputed in backward.

Pass 1 merges the states of every slice. Backward forms each slice's logits again, then dz, writes that slice's rows of
dW once and adds into a float32 dhidden. Rows without a gradient are dropped; rows whose KL has none (TDPO2's chosen
responses) skip the reference's product.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import ops
from .heads import Heads, Options, logits_into
from .matmul import product
from .plan import Plan
from .rows import Rows
from .shard import VocabShard
from .workspace import scratch


def streamed_divergence(heads: Heads, rows: Rows, options: Options, plan: Plan) -> tuple[Tensor, ...]:
    """(logps, ref_logps, kl, entropy, correct), each (N,) over all rows of the flat `heads`, 0 at rows left out."""
    return _Streaming.apply(heads.hidden, heads.weight, heads.bias, heads, rows, options, plan)


class _Streaming(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, heads, rows, options, plan):
        with torch.autocast(hidden.device.type, enabled=False):
            states = _states(heads, rows.index, options, plan)
            labels = heads.labels[rows.index]
            kept = ops.finalize_row_states(states, labels, options.ignore_index, options.temperature)
        ctx.save_for_backward(hidden, weight, bias, rows.index, states)
        ctx.heads, ctx.options, ctx.plan = heads, options, plan
        values = []
        for value in kept:
            values.append(value.new_zeros(len(heads.labels)).index_copy_(0, rows.index, value))
        ctx.mark_non_differentiable(values[1], values[3], values[4])
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, logp_grad, _ref_logp_grad, kl_grad, *_):
        *_, index, states = ctx.saved_tensors  # unpacking them finds inputs modified in place
        a, k = logp_grad[index], kl_grad[index]
        # Rows with a KL gradient come first; rows with no gradient at all are left out.
        order = torch.cat([(k != 0).nonzero()[:, 0], ((k == 0) & (a != 0)).nonzero()[:, 0]])
        with_reference = int((k != 0).sum())
        rows = (index[order], states[order], a[order].to(states.dtype), k[order].to(states.dtype))
        with torch.autocast(index.device.type, enabled=False):
            gradients = _gradients(ctx.heads, *rows, with_reference, ctx.options, ctx.plan, ctx.needs_input_grad[:3])
        return (*gradients, None, None, None, None)


def _sum_over(shard: VocabShard, grad: Tensor, failure: Exception | None = None) -> Callable[[], object]:
    """Starts to sum `grad` over the ranks; what is returned waits for the sum and puts it in its place.

    With a `failure` of this rank, it is that which all ranks get.
    """

    def local(out: Tensor) -> None:
        if failure is not None:
            raise failure
        out.copy_(grad)

    finish = shard.sum(local, grad.shape, grad)
    return lambda: grad.copy_(finish())


def _slices(total: int, size: int) -> list[tuple[int, int]]:
    return [(first, min(total, first + size)) for first in range(0, total, max(1, size))]


def _states(heads: Heads, index: Tensor, options: Options, plan: Plan) -> Tensor:
    """Merged row states of the rows at `index`: (rows, state size)."""
    dtype = heads.logit_dtype
    merged = torch.empty(len(index), ops.STATE_SIZE, dtype=dtype, device=heads.hidden.device)
    buffer = ((plan.rows * plan.columns,), dtype)
    buffers = scratch([buffer, buffer], heads.hidden.device)
    for begin, end in _slices(len(index), plan.rows):
        block = index[begin:end]
        local = functools.partial(_block_states, heads, block, options, plan.columns, buffers)
        merged[begin:end] = ops.merge_over(options.shard, local, heads.labels[block], dtype)
    return merged


def _block_states(heads: Heads, block: Tensor, options: Options, columns: int, buffers: list[Tensor]) -> Tensor:
    """States of the rows at `block` over what this rank holds of the vocabulary."""
    hidden, ref_hidden, labels = heads.hidden[block], heads.ref_hidden[block], heads.labels[block]
    total = None
    for first, stop in _slices(heads.vocab, columns) or [(0, 0)]:
        shape = (len(block), stop - first)
        z = logits_into(_view(buffers[0], shape), hidden, heads.weight, heads.bias, first)
        r = logits_into(_view(buffers[1], shape), ref_hidden, heads.ref_weight, heads.ref_bias, first)
        state = ops.row_states(z, r, labels, *options.slice_from(first))
        total = state if total is None else ops.merge_row_states(torch.stack([total, state]))
    return total


def _view(buffer: Tensor, shape: tuple[int, int]) -> Tensor:
    return buffer[: shape[0] * shape[1]].view(shape)


def _gradients(heads: Heads, index, states, logp_grad, kl_grad, with_reference, options, plan, wanted):
    """dhidden, dW, dbias. The first `with_reference` of the rows at `index` have a KL gradient."""
    weight, dtype, device = heads.weight, heads.logit_dtype, heads.weight.device
    hidden_grad = torch.zeros(len(index), heads.hidden.shape[1], dtype=dtype, device=device) if wanted[0] else None
    weight_grad = ops.empty(weight.shape, weight.dtype, device).zero_() if wanted[1] else None
    bias_grad = torch.zeros(heads.vocab, dtype=dtype, device=device) if wanted[2] else None
    # Blocks do not straddle the rows with and without a KL gradient.
    blocks = _slices(with_reference, plan.rows)
    blocks += [(with_reference + a, with_reference + b) for a, b in _slices(len(index) - with_reference, plan.rows)]

    size = (plan.rows * plan.columns,)
    # dz is written over z where it has its dtype; a low-precision slice of dW from several blocks is summed first.
    dz_size = size if weight.dtype != dtype else (0,)
    sums_slices = wanted[1] and len(blocks) > 1 and weight.dtype != dtype
    sum_size = (plan.columns if sums_slices else 0, weight.shape[1])
    needed = [(size, dtype), (size, dtype), (dz_size, weight.dtype), (sum_size, dtype)]
    z_buffer, r_buffer, dz_buffer, sum_buffer = scratch(needed, device)
    shard = options.hidden_grad_shard if wanted[0] else None
    summed: list[Callable[[], object]] = []  # by blocks, each started as soon as this rank's share is whole
    slices = (_slices(heads.vocab, plan.columns) or [(0, 0)]) if any(wanted) else []
    try:
        for first, stop in slices:
            for begin, end in blocks:
                block, shape = index[begin:end], (end - begin, stop - first)
                hidden = heads.hidden[block]
                z = logits_into(_view(z_buffer, shape), hidden, weight, heads.bias, first)
                r = z  # not read where the KL has no gradient
                if begin < with_reference:
                    ref_hidden = heads.ref_hidden[block]
                    r = logits_into(_view(r_buffer, shape), ref_hidden, heads.ref_weight, heads.ref_bias, first)
                dz = z if weight.dtype == dtype else _view(dz_buffer, shape)
                ops.logit_gradient_out(
                    *(z, r, heads.labels[block], states[begin:end], logp_grad[begin:end], kl_grad[begin:end]),
                    *(*options.slice_from(first), dz),
                )
                if hidden_grad is not None:
                    product(dz, weight[first:stop], hidden_grad[begin:end], accumulate=True)
                    if shard is not None and stop == heads.vocab:
                        summed.append(_sum_over(shard, hidden_grad[begin:end]))
                if weight_grad is not None:
                    target = sum_buffer[: stop - first] if sums_slices else weight_grad[first:stop]
                    product(dz.t(), hidden, target, accumulate=begin > 0)
                if bias_grad is not None:
                    bias_grad[first:stop] += dz.sum(0, dtype=dtype)
            if weight_grad is not None and sums_slices:
                weight_grad[first:stop] = sum_buffer[: stop - first]
    except Exception as error:
        if shard is None or hidden_grad is None:
            raise
        summed += [_sum_over(shard, hidden_grad[begin:end], error) for begin, end in blocks[len(summed) :]]
    for finish in summed:
        finish()

    if hidden_grad is not None:
        spread = torch.zeros_like(heads.hidden)
        hidden_grad = spread.index_copy_(0, index, hidden_grad.to(spread.dtype))
    return hidden_grad, weight_grad, None if bias_grad is None else bias_grad.to(weight.dtype)
