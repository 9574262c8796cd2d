"""Pairs in chunks: gradients are formed in the forward pass, while the logits are there; nothing is recomputed.

A preference loss couples only the rows of one pair, so a chunk of whole pairs can be taken from hidden states to
finished gradients at once: logits, row states, the objective's own small autograd for dL/dlogps and dL/dkl, dz (written
over the logits where it can be), then dhidden = dz W and dW += dz^T hidden.

A pair that is too long for the budget is taken a block of rows at a time (`long_pairs`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import BiasGradient, Gradients, HiddenGradient, Wanted
from .long_pairs import long_pair
from .objective_gradient import Upstream
from .pair_loss import Outcome, PairLoss, column_gradient
from .planning.plan import ChunkedPlan, LongPair
from .rows import Chunk
from .run import Buffers, Run
from .weight_gradient import WholeWeightGradient


def chunked_loss(loss: PairLoss, plan: ChunkedPlan, wanted: Wanted, wanted_columns: frozenset[str]) -> Outcome:
    """Loss, sums and gradients of a batch of pairs, chunk by chunk.

    The objective is a MarginLoss where the plan has long pairs, does not separate, and a gradient is wanted.
    """
    inputs = loss.inputs
    rows = loss.rows.in_chunks([chunk.pairs for chunk in plan.chunks])
    buffers = Buffers.allocate(inputs, plan, wanted)
    run = Run(
        inputs=inputs,
        plan=plan,
        wanted=wanted,
        objective=loss.pair_objective(wanted, wanted_columns),
        rows=rows,
        labels=rows.take(inputs.labels),
        columns={name: rows.take(column.detach()) for name, column in loss.columns.items()},
        buffers=buffers,
        gradients=Gradients(
            hidden=HiddenGradient(inputs, rows) if wanted.hidden else None,
            bias=BiasGradient(inputs) if wanted.bias else None,
            weights=[
                WholeWeightGradient(weight, buffers.weight_rests.get(part)) if needed else None
                for part, (weight, needed) in enumerate(zip(inputs.head.weights, wanted.weights))
            ],
            widths=inputs.head.widths,
        ),
    )
    losses: list[Tensor] = []
    sums: list[tuple[Tensor, ...]] = []  # of each chunk's sides
    for planned, chunk in zip(plan.chunks, rows.chunks):
        upstream = long_pair(run, chunk) if isinstance(planned, LongPair) else _whole_pairs(run, chunk)
        inputs.compare_over_ranks(upstream.loss, upstream.logps_grad, upstream.kl_grad)
        losses.append(upstream.loss)
        sums.append(upstream.sums.chunk(chunk.sides, dim=1))
        for name, grad in upstream.columns_grad.items():
            run.column_grads.setdefault(name, []).append(grad)
    run.flush()
    return Outcome(
        loss=losses[0] if len(losses) == 1 else torch.stack(losses).sum(),
        sides=sums[0] if len(sums) == 1 else tuple(torch.cat(of_side, dim=1) for of_side in zip(*sums)),
        gradients=run.gradients.finish(),
        column_gradients={
            name: column_gradient(loss.columns[name], rows.index, torch.cat(grads))
            for name, grads in run.column_grads.items()
        },
    )


def _whole_pairs(run: Run, chunk: Chunk) -> Upstream:
    """Pairs whose logits are there together: adds their gradients."""
    run.make_room(chunk.count)
    block, columns = run.forward(chunk.rows), run.columns_of(chunk)
    upstream = run.exchange.run(
        lambda: run.objective.upstream(block.values, chunk, columns),
        lambda: run.objective.nothing(block.values, chunk),
    )
    if run.wanted.any and len(block.states):
        run.keep_dz(block, upstream.logps_grad, upstream.kl_grad)
    return upstream
