"""Pairs in chunks: gradients are formed in the forward pass, while the logits are there; nothing is recomputed.

A preference loss couples only the rows of one pair, so a chunk of whole pairs can be taken from hidden states to
finished gradients at once: logits, row states, the objective's own small autograd for dL/dlogps and dL/dkl, dz (written
over the logits where it has their dtype), then dhidden = dz W and dW += dz^T hidden.

A pair that is too long for the budget is taken a block of rows at a time. The gradient of a `MarginLoss` by every row
is one number of the pair, link'(margin), times a gradient with coefficients that are known at once. So each block's
gradients are accumulated unscaled, and that number is multiplied in when the pair is complete ("deferred").
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..divergence import TokenDivergence
from ..losses import Objective
from ..ops import memory, operators
from ..ops.memory import Buffer
from ..vocab_parallel import Exchange
from .gradients import BiasGradient, Block, DeferredGradients, Gradients, HiddenGradient, Wanted, WeightGradient, slices
from .inputs import FusedInputs, GatheredRows
from .pair_loss import Outcome, PairLoss, column_gradient
from .plan import ChunkedPlan, row_pitch
from .rows import Chunk, Rows
from .upstream import Coefficients, PairObjective, Upstream


def chunked_loss(
    objective: Objective, inputs: FusedInputs, rows: Rows, plan: ChunkedPlan, columns: Mapping[str, Tensor]
) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
    """(mean loss over pairs, and sums of the chosen and the rejected sequences, each (B,), without a graph).

    `objective` is a MarginLoss where the plan defers and a gradient is wanted.
    """
    loss = PairLoss(objective, inputs, rows, columns)
    return loss.apply(functools.partial(_run, loss, plan))


@dataclass(frozen=True)
class _Buffers:
    """Scratch memory of a call.

    Attributes:
        z, r: policy and reference logits of a block.
        dz: of a block, or of all rows where it is kept; `z` itself where it has its dtype.
        weight_sum: the float32 sum of a low-precision dW over several blocks.
        pair_weight: dW of a deferred pair, where there are others.
    """

    z: Tensor
    r: Tensor
    dz: Tensor
    weight_sum: Tensor | None
    pair_weight: Tensor | None

    @classmethod
    def allocate(cls, inputs: FusedInputs, rows: int, plan: ChunkedPlan, wanted: Wanted) -> _Buffers:
        pitch, weight_shape = row_pitch(inputs.vocab), tuple(inputs.policy.weight.shape)
        logits = Buffer((plan.rows, inputs.vocab), inputs.logit_dtype, pitch)
        dz = weight_sum = pair_weight = None
        if any(wanted) and inputs.weight_dtype != inputs.logit_dtype:
            dz_rows = rows if plan.keeps_dz else plan.rows
            dz = Buffer((dz_rows, inputs.vocab), inputs.weight_dtype, pitch)
            if wanted.weight and (len(plan.chunks) > 1 or plan.deferred) and not plan.keeps_dz:
                weight_sum = Buffer(weight_shape, inputs.logit_dtype)
        if wanted.weight and plan.deferred and len(plan.chunks) > 1:
            pair_weight = Buffer(weight_shape, inputs.logit_dtype)
        found = memory.allocate(
            inputs.device, {"z": logits, "r": logits, "dz": dz, "weight_sum": weight_sum, "pair_weight": pair_weight}
        )
        z = found["z"]
        return cls(
            z=z,
            r=found["r"],
            dz=found.get("dz", z),
            weight_sum=found.get("weight_sum"),
            pair_weight=found.get("pair_weight"),
        )


@dataclass(frozen=True)
class _ForwardBlock:
    """A block of rows whose logits are in the buffers: states (rows, state size) and values (fields, rows)."""

    rows: slice
    gathered: GatheredRows
    states: Tensor
    values: Tensor


@dataclass
class _Run:
    """A call while it runs: the same for every chunk."""

    inputs: FusedInputs
    plan: ChunkedPlan
    objective: PairObjective
    index: Tensor  # of all rows, chunk after chunk
    labels: Tensor  # of these
    columns: Mapping[str, Tensor]
    buffers: _Buffers
    gradients: Gradients
    column_grads: dict[str, list[Tensor]] = field(default_factory=dict)  # chunk by chunk

    @property
    def exchange(self) -> Exchange:
        return self.inputs.exchange

    @property
    def vocabulary(self) -> slice:
        return slice(0, self.inputs.vocab)

    def columns_of(self, chunk: Chunk) -> dict[str, Tensor]:
        return {name: column[chunk.rows] for name, column in self.columns.items()}

    def forward(self, rows: slice) -> _ForwardBlock:
        """Row states and values of a block of rows; leaves their logits in the buffers."""
        inputs, count = self.inputs, rows.stop - rows.start
        gathered = inputs.rows_at(self.index[rows], self.labels[rows])
        local_states = functools.partial(
            inputs.row_states, gathered, self.vocabulary, z=self.buffers.z[:count], r=self.buffers.r[:count]
        )
        states = inputs.merge_over_ranks(count, local_states)
        return _ForwardBlock(rows, gathered, states, inputs.finalize(states, gathered.labels))

    def form_dz(self, block: _ForwardBlock, logps_grad: Tensor, kl_grad: Tensor) -> Tensor:
        """dz of the block whose logits are in the buffers."""
        count = block.rows.stop - block.rows.start
        dz = self.buffers.dz[block.rows] if self.plan.keeps_dz else self.buffers.dz[:count]

        def write() -> Tensor:
            operators.logit_gradient_out(
                self.buffers.z[:count],
                self.buffers.r[:count],
                block.gathered.labels,
                block.states,
                logps_grad=logps_grad,
                kl_grad=kl_grad,
                options=self.inputs.options,
                out=dz,
            )
            return dz

        return self.exchange.run(write, lambda: dz)


def _run(loss: PairLoss, plan: ChunkedPlan, wanted: Wanted, wanted_columns: frozenset[str]) -> Outcome:
    inputs = loss.inputs
    rows = loss.rows.in_chunks(plan.chunks)
    buffers = _Buffers.allocate(inputs, len(rows.index), plan, wanted)
    run = _Run(
        inputs=inputs,
        plan=plan,
        objective=loss.pair_objective(wanted, wanted_columns),
        index=rows.index,
        labels=inputs.labels[rows.index],
        columns={name: column.detach()[rows.index] for name, column in loss.columns.items()},
        buffers=buffers,
        gradients=Gradients(
            hidden=HiddenGradient(inputs, rows.index) if wanted.hidden else None,
            weight=WeightGradient(inputs, buffers.weight_sum) if wanted.weight else None,
            bias=BiasGradient(inputs) if wanted.bias else None,
        ),
    )
    losses: list[Tensor] = []
    chosen: list[Tensor] = []
    rejected: list[Tensor] = []
    for chunk in rows.chunks:
        fits = chunk.rows.stop - chunk.rows.start <= plan.rows
        upstream = _whole_chunk(run, chunk) if fits else _long_pair(run, chunk)
        losses.append(upstream.loss)
        for side, sums in zip((chosen, rejected), upstream.sums.chunk(2, dim=1)):
            side.append(sums)
        for name, grad in upstream.columns_grad.items():
            run.column_grads.setdefault(name, []).append(grad)
    if plan.keeps_dz and run.gradients.weight is not None and len(rows.index):
        run.gradients.weight.add(run.vocabulary, inputs.policy.hidden[rows.index], buffers.dz)
    return Outcome(
        loss=torch.stack(losses).sum(),
        chosen=torch.cat(chosen, dim=1),
        rejected=torch.cat(rejected, dim=1),
        gradients=run.gradients.finish(),
        column_gradients={
            name: column_gradient(loss.columns[name], rows.index, torch.cat(grads))
            for name, grads in run.column_grads.items()
        },
    )


def _whole_chunk(run: _Run, chunk: Chunk) -> Upstream:
    """Whole pairs whose rows fit the buffers: adds their gradients."""
    block, columns = run.forward(chunk.rows), run.columns_of(chunk)
    upstream = run.exchange.run(
        lambda: run.objective.upstream(block.values, chunk, columns),
        lambda: run.objective.nothing(block.values, chunk),
    )
    if run.gradients.any and len(block.states):
        dz = run.form_dz(block, upstream.logps_grad, upstream.kl_grad)
        run.gradients.add(Block(chunk.rows, run.vocabulary), block.gathered.hidden, dz, defer_weight=run.plan.keeps_dz)
    return upstream


def _long_pair(run: _Run, chunk: Chunk) -> Upstream:
    """A pair taken a block of rows at a time: adds its gradients, those of a MarginLoss, where any are wanted."""
    blocks = [
        slice(chunk.rows.start + rows.start, chunk.rows.start + rows.stop)
        for rows in slices(chunk.rows.stop - chunk.rows.start, run.plan.rows)
    ]
    columns = run.columns_of(chunk)
    if not run.objective.differentiable:
        values = torch.cat([run.forward(rows).values for rows in blocks], dim=1)
        return run.exchange.run(
            lambda: run.objective.upstream(values, chunk, columns), lambda: run.objective.nothing(values, chunk)
        )

    placeholders = _placeholder_values(run, chunk)
    coefficients = run.exchange.run(
        lambda: run.objective.coefficients(placeholders, chunk, columns),
        lambda: Coefficients(placeholders[0], placeholders[0]),
    )
    pair = DeferredGradients(run.gradients, run.inputs, chunk.rows, run.buffers.pair_weight)
    values_of_blocks = []
    for rows in blocks:
        block = run.forward(rows)
        values_of_blocks.append(block.values)
        if run.gradients.any:
            within = slice(rows.start - chunk.rows.start, rows.stop - chunk.rows.start)
            dz = run.form_dz(block, coefficients.logps_grad[within], coefficients.kl_grad[within])
            pair.add(Block(rows, run.vocabulary), block.gathered.hidden, dz)
    values = torch.cat(values_of_blocks, dim=1)
    upstream, slope = run.exchange.run(
        lambda: run.objective.link_upstream(values, chunk, columns),
        lambda: (run.objective.nothing(values, chunk), values.new_zeros(())),
    )
    pair.commit(slope)
    return upstream


def _placeholder_values(run: _Run, chunk: Chunk) -> Tensor:
    """Values before the logits are known: what a margin's coefficients may depend on, `tokens`, is right."""
    inputs, labels = run.inputs, run.labels[chunk.rows]
    values = torch.ones(operators.TOKEN_VALUES, len(labels), dtype=inputs.logit_dtype, device=inputs.device)
    values[TokenDivergence._fields.index("tokens")] = labels != inputs.options.ignore_index
    return values
