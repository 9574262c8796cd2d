"""The chunked plan: whole pairs at a time, both heads' logits in memory, gradients formed in the forward pass.

A preference loss couples only the rows of one pair, so a chunk of whole pairs can be taken from hidden states to
finished gradients at once: logits, row states, per-sequence sums, the objective's own small autograd for dL/dlogps and
dL/dkl, dz (written over the logits where it has their dtype), then dhidden = dz W and dW += dz^T hidden. Nothing is
recomputed in backward, which only hands the gradients over.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..divergence import TokenDivergence
from ..losses import Objective
from ..ops import memory, operators
from ..ops.memory import Buffer
from .gradients import BiasGradient, Block, Gradients, HiddenGradient, Wanted, WeightGradient
from .inputs import FusedInputs
from .plan import ChunkedPlan
from .rows import Chunk, Rows


@dataclass(frozen=True)
class ChunkedCall:
    """A preference loss to be computed chunk by chunk; differentiable if any policy tensor wants its gradient."""

    objective: Objective
    inputs: FusedInputs
    rows: Rows
    plan: ChunkedPlan
    differentiable: bool


def chunked_loss(
    objective: Objective, inputs: FusedInputs, rows: Rows, plan: ChunkedPlan
) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
    """(mean loss over pairs, and sums of the chosen and the rejected sequences, each (B,), without a graph)."""
    policy = inputs.policy
    leaves = (policy.hidden, policy.weight, policy.bias)
    differentiable = torch.is_grad_enabled() and any(leaf is not None and leaf.requires_grad for leaf in leaves)
    call = ChunkedCall(objective, inputs, rows, plan, differentiable)
    loss, chosen, rejected = _Chunked.apply(*leaves, call)
    return loss, TokenDivergence.unstack(chosen), TokenDivergence.unstack(rejected)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor | None, call: ChunkedCall):
        wanted = Wanted._make(call.differentiable and needed for needed in ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            loss, chosen, rejected, ctx.gradients = _run(call, wanted)
        ctx.mark_non_differentiable(chosen, rejected)
        return loss, chosen, rejected

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, loss_grad: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "tdpo_ext: the gradients of this linear_preference_loss were handed over by an earlier backward; "
                "compute the loss again (retain_graph can't keep them)"
            )
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:
            if gradient is not None:
                operators.scale_unless_one(gradient, loss_grad.to(operators.state_dtype(gradient.dtype)))
        return (*gradients, None)


@dataclass(frozen=True)
class _Buffers:
    """Scratch memory of a call.

    Attributes:
        z, r: policy and reference logits of a chunk.
        dz: of a chunk, or of all rows where it is kept; `z` itself where it has its dtype.
        weight_sum: the float32 sum of a low-precision dW over several chunks.
    """

    z: Tensor
    r: Tensor
    dz: Tensor
    weight_sum: Tensor | None

    @classmethod
    def allocate(cls, call: ChunkedCall, wanted: Wanted) -> _Buffers:
        inputs, plan = call.inputs, call.plan
        logits = Buffer((plan.rows, inputs.vocab), inputs.logit_dtype)
        dz = weight_sum = None
        if any(wanted) and inputs.weight_dtype != inputs.logit_dtype:
            dz_rows = len(call.rows.index) if plan.keeps_dz else plan.rows
            dz = Buffer((dz_rows, inputs.vocab), inputs.weight_dtype)
            if wanted.weight and len(plan.chunks) > 1 and not plan.keeps_dz:
                weight_sum = Buffer(tuple(inputs.policy.weight.shape), inputs.logit_dtype)
        found = memory.allocate(inputs.device, {"z": logits, "r": logits, "dz": dz, "weight_sum": weight_sum})
        z = found["z"]
        return cls(z=z, r=found["r"], dz=found.get("dz", z), weight_sum=found.get("weight_sum"))

    def dz_of(self, chunk: Chunk, plan: ChunkedPlan) -> Tensor:
        """Where the chunk's dz goes."""
        return self.dz[chunk.rows] if plan.keeps_dz else self.dz[: chunk.rows.stop - chunk.rows.start]


def _run(call: ChunkedCall, wanted: Wanted):
    """Loss, sums of chosen and of rejected sequences, each (fields, B), and the gradients."""
    inputs, plan = call.inputs, call.plan
    index, chunks = call.rows.in_chunks(plan.chunks)
    buffers = _Buffers.allocate(call, wanted)
    gradients = Gradients(
        hidden=HiddenGradient(inputs, index) if wanted.hidden else None,
        weight=WeightGradient(inputs, buffers.weight_sum) if wanted.weight else None,
        bias=BiasGradient(inputs) if wanted.bias else None,
    )
    vocabulary = slice(0, inputs.vocab)
    losses: list[Tensor] = []
    chosen: list[Tensor] = []
    rejected: list[Tensor] = []
    for chunk in chunks:
        rows = index[chunk.rows]
        z, r = buffers.z[: len(rows)], buffers.r[: len(rows)]
        states = inputs.merge_over_ranks(rows, functools.partial(inputs.row_states, rows, vocabulary, z=z, r=r))
        sums = chunk.segments.sum(inputs.finalize(states, rows))
        upstream = _objective_gradients(call, TokenDivergence.unstack(sums))
        losses.append(upstream.loss)
        for side, part in zip((chosen, rejected), sums.chunk(2, dim=1)):
            side.append(part)
        if gradients.any and len(rows):
            dz = buffers.dz_of(chunk, plan)
            operators.logit_gradient_out(
                z,
                r,
                inputs.labels[rows],
                states,
                logps_grad=chunk.segments.spread(upstream.logps_grad),
                kl_grad=chunk.segments.spread(upstream.kl_grad),
                options=inputs.options,
                out=dz,
            )
            hidden = inputs.policy.hidden[rows]
            gradients.add(Block(chunk.rows, vocabulary), hidden, dz, defer_weight=plan.keeps_dz)
    if plan.keeps_dz and gradients.weight is not None and len(index):
        gradients.weight.add(vocabulary, inputs.policy.hidden[index], buffers.dz)
    return torch.stack(losses).sum(), torch.cat(chosen, dim=1), torch.cat(rejected, dim=1), gradients.finish()


class _Upstream(NamedTuple):
    """A chunk's share of the mean loss, and its gradients with respect to each sequence's sums, (2b,)."""

    loss: Tensor
    logps_grad: Tensor
    kl_grad: Tensor


def _objective_gradients(call: ChunkedCall, sums: TokenDivergence) -> _Upstream:
    logps, kl = (value.detach().requires_grad_(call.differentiable) for value in (sums.logps, sums.kl))
    pairs = len(logps) // 2
    with torch.set_grad_enabled(call.differentiable):
        chosen, rejected = sums._replace(logps=logps, kl=kl).chunk(2)
        losses = call.objective(chosen, rejected)
        if losses.shape != (pairs,):
            raise ValueError(f"objective returned {tuple(losses.shape)} for {pairs} pairs")
        loss = losses.sum() / call.rows.pairs
    if not (call.differentiable and loss.requires_grad):
        return _Upstream(loss.detach(), torch.zeros_like(logps), torch.zeros_like(kl))
    logps_grad, kl_grad = torch.autograd.grad(loss, (logps, kl), allow_unused=True, materialize_grads=True)
    return _Upstream(loss.detach(), logps_grad, kl_grad)
