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


def resident_loss(objective, heads: Heads, rows: Rows, options: Options, plan: Plan):
    """(loss, chosen, rejected) as `linear_preference_loss` returns them; `heads` are flat."""
    differentiable = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (heads.hidden, heads.weight, heads.bias)
    )
    loss, *sums = _Resident.apply(
        heads.hidden, heads.weight, heads.bias, heads, objective, rows, options, plan, differentiable
    )
    chosen, rejected = TokenDivergence(*sums).chunk(2)
    return loss, chosen, rejected


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
        if loss_grad != 1:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(loss_grad)
        return (*gradients, *(None for _ in range(6)))


class _Gradients:
    """dhidden, dW and dbias of a call, filled chunk by chunk."""

    def __init__(self, heads: Heads, wanted: list[bool], chunks: int):
        self.heads = heads
        hidden, weight = heads.hidden, heads.weight
        self.hidden = torch.zeros_like(hidden) if wanted[0] else None
        # Several chunks are summed in float32; a single one is written once, in the dtype of the weight.
        sum_dtype = weight.dtype if chunks == 1 else heads.logit_dtype
        self.weight = ops.empty(weight.shape, sum_dtype, weight.device) if wanted[1] else None
        self.bias = torch.zeros(heads.vocab, dtype=heads.logit_dtype, device=weight.device) if wanted[2] else None
        self.empty = True

    def add(self, index: Tensor, hidden: Tensor, dz: Tensor) -> None:
        if self.hidden is not None:
            self.hidden.index_copy_(0, index, torch.mm(dz, self.heads.weight))
        if self.weight is not None:
            product(dz.t(), hidden, self.weight, accumulate=not self.empty)
        if self.bias is not None:
            self.bias += dz.sum(0, dtype=self.bias.dtype)
        self.empty = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.weight is not None and self.empty:
            self.weight.zero_()
        return self.hidden, *(self._as_weight(grad) for grad in (self.weight, self.bias))

    def _as_weight(self, grad: Tensor | None) -> Tensor | None:
        dtype = self.heads.weight.dtype
        if grad is None or grad.dtype == dtype:
            return grad
        return ops.empty(grad.shape, dtype, grad.device).copy_(grad)


def _run(objective, heads: Heads, rows: Rows, options: Options, plan: Plan, wanted: list[bool]):
    gradients = _Gradients(heads, wanted, len(plan.pairs))
    device, dtype = heads.hidden.device, heads.logit_dtype
    z_buffer, r_buffer = (ops.empty((plan.rows, heads.vocab), dtype, device) for _ in range(2))
    in_place = heads.weight.dtype == dtype
    dz_buffer = z_buffer if in_place or not any(wanted) else ops.empty(z_buffer.shape, heads.weight.dtype, device)

    losses, sums = [], []
    for first, stop in plan.pairs:
        chunk = rows.of_pairs(first, stop)
        count = len(chunk.index)
        hidden, labels = heads.hidden[chunk.index], heads.labels[chunk.index]
        z = logits_into(z_buffer[:count], hidden, heads.weight, heads.bias)
        r = logits_into(r_buffer[:count], heads.ref_hidden[chunk.index], heads.ref_weight, heads.ref_bias)
        slice_options = (0, heads.vocab, options.ignore_index, options.temperature, options.softcap)
        states = ops.row_states(z, r, labels, *slice_options)
        values = ops.finalize_row_states(states, labels, options.ignore_index, options.temperature)
        sequences = TokenDivergence(*(chunk.sequence_sums(value) for value in values))

        loss, logp_grad, kl_grad = _objective_gradients(objective, sequences, rows.pairs, any(wanted))
        losses.append(loss)
        sums.append(sequences)
        if any(wanted) and count:
            dz = dz_buffer[:count]
            upstream = (chunk.spread(logp_grad), chunk.spread(kl_grad))
            ops.logit_gradient_out(z, r, labels, states, *upstream, *slice_options, dz)
            gradients.add(chunk.index, hidden, dz)

    def joined(side: int) -> list[Tensor]:
        return [torch.cat(parts) for parts in zip(*(sequences.chunk(2)[side] for sequences in sums))]

    whole = [torch.cat(sides) for sides in zip(joined(0), joined(1))]
    return torch.stack(losses).sum(), whole, gradients.finish()


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
