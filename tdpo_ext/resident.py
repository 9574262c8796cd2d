"""The resident plan: whole pairs at a time, both heads' logits in memory, gradients formed in the forward pass.

A preference loss couples only the rows of one pair, so a chunk of whole pairs can be taken from hidden states to
finished gradients at once: logits, row states, per-sequence sums, the objective's own small autograd for dL/dlogp and
dL/dkl, dz (written over the logits where it has their dtype), then dhidden = dz W and dW += dz^T hidden. Nothing is
recomputed in backward, which only hands the gradients over.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .divergence import TokenDivergence
from .heads import Heads, Options, logits_into
from .matmul import product
from .plan import Plan
from .rows import Rows
from .shard import VocabShard
from .workspace import scratch


def resident_loss(objective, heads: Heads, rows: Rows, options: Options, plan: Plan):
    """(loss, and per-sequence sums (2B,) of logps, ref_logps, kl, entropy, correct); `heads` are flat."""
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (heads.hidden, heads.weight, heads.bias)
    )
    return _Resident.apply(
        heads.hidden, heads.weight, heads.bias, heads, objective, rows, options, plan, differentiable
    )


class _Resident(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, heads, objective, rows, options, plan, differentiable):
        wanted = [differentiable and needed for needed in ctx.needs_input_grad[:3]]
        with torch.autocast(hidden.device.type, enabled=False):
            loss, sums, gradients = _run(objective, heads, rows, options, plan, wanted)
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*sums)
        return loss, *sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "tdpo_ext: the gradients of this linear_preference_loss were handed over by an earlier backward; "
                "compute the loss again (retain_graph can't keep them)"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                ops.scale_unless_one(gradient, loss_grad.to(ops.state_dtype(gradient.dtype)))
        return (*gradients, *(None for _ in range(6)))


class _Gradients:
    """dhidden, dW and dbias of a call. Low-precision dW is never summed in low precision: it is one product over all
    rows, or is summed in the float32 `weight_sum` and rounded at the end."""

    def __init__(self, heads: Heads, wanted: list[bool], weight_sum: Tensor | None, shard: VocabShard | None):
        self.heads = heads
        self.shard = shard  # over whose ranks dhidden is summed
        self.wanted = any(wanted)
        hidden, weight = heads.hidden, heads.weight
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        self.weight = weight_sum
        if weight_sum is None and wanted[1]:
            self.weight = ops.empty(weight.shape, weight.dtype, weight.device)
        self.bias = torch.zeros(heads.vocab, dtype=heads.logit_dtype, device=weight.device) if wanted[2] else None
        self.empty = True

    def add(self, index: Tensor, hidden: Tensor, dz: Tensor, with_weight: bool) -> None:
        """The rows' share of dhidden and dbias and, where asked for, of dW; ranks sum dhidden meanwhile."""
        summed = None
        if self.hidden is not None and self.shard is not None:
            like = torch.empty(0, dtype=self.heads.logit_dtype, device=hidden.device)
            summed = self.shard.sum(lambda out: product(dz, self.heads.weight, out), hidden.shape, like)
        elif self.hidden is not None:
            self.hidden.index_copy_(0, index, torch.mm(dz, self.heads.weight))
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        if with_weight:
            self.add_weight(hidden, dz)
        if self.hidden is not None and summed is not None:
            self.hidden.index_copy_(0, index, summed().to(self.hidden.dtype))

    def add_weight(self, hidden: Tensor, dz: Tensor) -> None:
        """The rows' share of dW."""
        if self.weight is not None and len(hidden):
            product(dz.t(), hidden, self.weight, accumulate=not self.empty)
            self.empty = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.weight is not None and self.empty:
            self.weight.zero_()
        return self.hidden, self._as_weight(self.weight), self._as_weight(self.bias)

    def _as_weight(self, grad: Tensor | None) -> Tensor | None:
        dtype = self.heads.weight.dtype
        if grad is None or grad.dtype == dtype:
            return grad
        return ops.empty(grad.shape, dtype, grad.device).copy_(grad)


def _run(objective, heads: Heads, rows: Rows, options: Options, plan: Plan, wanted: list[bool]):
    dtype, weight_dtype = heads.logit_dtype, heads.weight.dtype
    logits = ((plan.rows, heads.vocab), dtype)
    needed = [logits, logits]
    separate_dz = any(wanted) and weight_dtype != dtype
    if separate_dz:
        needed.append(((len(rows.index) if plan.keeps_dz else plan.rows, heads.vocab), weight_dtype))
    if wanted[1] and separate_dz and len(plan.pairs) > 1 and not plan.keeps_dz:
        needed.append((heads.weight.shape, dtype))
    z_buffer, r_buffer, *more = scratch(needed, heads.hidden.device)
    dz_buffer = more[0] if separate_dz else z_buffer
    gradients = _Gradients(heads, wanted, more[1] if len(more) > 1 else None, options.hidden_grad_shard)
    loss, sums = _run_chunks(objective, heads, rows, options, plan, (z_buffer, r_buffer, dz_buffer), gradients)
    return loss, sums, gradients.finish()


def _run_chunks(objective, heads: Heads, rows: Rows, options: Options, plan: Plan, buffers, gradients: _Gradients):
    z_buffer, r_buffer, dz_buffer = buffers
    losses, sums, kept = [], [], []
    done = 0  # rows whose dz is kept
    for first, stop in plan.pairs:
        chunk = rows.of_pairs(first, stop)
        count = len(chunk.index)
        hidden, labels = heads.hidden[chunk.index], heads.labels[chunk.index]
        z, r = z_buffer[:count], r_buffer[:count]
        states = _chunk_states(heads, chunk.index, options, z, r)
        values = ops.finalize_row_states(states, labels, options.ignore_index, options.temperature)
        chunk_sums = [chunk.sequence_sums(value) for value in values]
        sequences = TokenDivergence(*chunk_sums[:4])

        loss, logp_grad, kl_grad = _objective_gradients(objective, sequences, rows.pairs, gradients.wanted)
        losses.append(loss)
        sums.append(chunk_sums)
        if gradients.wanted and count:
            dz = dz_buffer[done : done + count]
            upstream = (chunk.spread(logp_grad), chunk.spread(kl_grad))
            ops.logit_gradient_out(z, r, labels, states, *upstream, *options.slice_from(0), dz)
            gradients.add(chunk.index, hidden, dz, with_weight=not plan.keeps_dz)
            if plan.keeps_dz:
                kept.append(hidden)
                done += count
    if kept:
        gradients.add_weight(torch.cat(kept), dz_buffer[:done])

    # Chunks hold chosen before rejected; all together do too.
    halves = [[value.chunk(2) for value in values] for values in zip(*sums)]
    whole = [torch.cat([half[side] for side in (0, 1) for half in value]) for value in halves]
    return torch.stack(losses).sum(), whole


def _chunk_states(heads: Heads, index: Tensor, options: Options, z: Tensor, r: Tensor) -> Tensor:
    """States of the rows at `index` over the whole vocabulary; leaves this rank's logits in `z` and `r`."""
    hidden, ref_hidden, labels = heads.hidden[index], heads.ref_hidden[index], heads.labels[index]

    def local() -> Tensor:
        logits_into(z, hidden, heads.weight, heads.bias)
        logits_into(r, ref_hidden, heads.ref_weight, heads.ref_bias)
        return ops.row_states(z, r, labels, *options.slice_from(0))

    return ops.merge_over(options.shard, local, labels, heads.logit_dtype)


def _objective_gradients(objective, sequences: TokenDivergence, pairs: int, differentiable: bool):
    """This chunk's share of the mean loss, and its gradients with respect to the sums of logps and of kl, (2b,)."""
    logps, kl = (value.detach().requires_grad_(differentiable) for value in (sequences.logps, sequences.kl))
    with torch.set_grad_enabled(differentiable):
        tracked = TokenDivergence(logps, sequences.ref_logps, kl, sequences.entropy)
        per_pair = objective(*tracked.chunk(2))
        if per_pair.shape != (len(logps) // 2,):
            raise ValueError(f"objective returned {tuple(per_pair.shape)} for {len(logps) // 2} pairs")
        loss = per_pair.sum() / pairs
    if not (differentiable and loss.requires_grad):
        return loss.detach(), torch.zeros_like(logps), torch.zeros_like(kl)
    grads = torch.autograd.grad(loss, (logps, kl), allow_unused=True)
    return loss.detach(), *(torch.zeros_like(logps) if grad is None else grad for grad in grads)
