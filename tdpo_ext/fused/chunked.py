"""Pairs in chunks: gradients are formed in the forward pass, while the logits are there; nothing is recomputed.

A preference loss couples only the rows of one pair, so a chunk of whole pairs can be taken from hidden states to
finished gradients at once: logits, row states, the objective's own small autograd for dL/dlogps and dL/dkl, dz (written
over the logits where it has their dtype), then dhidden = dz W and dW += dz^T hidden.

A pair that is too long for the budget is taken a block of rows at a time ("deferred"). The gradient of a `MarginLoss`
by every row is one number of the pair, link'(margin), times a gradient with coefficients that are known at once. So a
block's dz is formed without that factor. It is kept until the pair is complete, and the factor is multiplied into the
rows of hidden; or, where the pair is too long for that, dhidden and dW are accumulated unscaled and multiplied then.

Products for gradients are taken over all rows whose dz is kept, since each reads a whole weight matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..divergence import TokenDivergence
from ..ops import memory, operators
from ..ops.memory import Buffer
from ..vocab_parallel import Exchange
from .blocks import Block, Factors, slices
from .gradients import BiasGradient, DeferredGradients, Gradients, HiddenGradient, Wanted
from .inputs import FusedInputs, GatheredRows
from .objective_gradient import Coefficients, PairObjective, Upstream
from .pair_loss import Outcome, PairLoss, column_gradient
from .planning.plan import ChunkedPlan, LongPair
from .planning.sizes import row_pitch, rows_beside
from .rows import Chunk, ChunkedRows, reading_is_free
from .weight_gradient import WholeWeightGradient

_MOVED_ROWS = 16  # rows of dz moved at a time into the places of rows without a gradient


@dataclass(frozen=True)
class _Buffers:
    """Scratch memory of a call.

    Attributes:
        z, r: policy and reference logits of a block; the same where there is no reference.
        dz: of the rows whose dz is kept; `z` itself where those are a block's and have its dtype.
        weight_rests: of each part of the head that wants a gradient, by its place, what the memory of a low-precision
            dW does not hold of its sum; empty where it is not summed.
        pair_weights: of each such part, dW of a pair that is summed apart; empty where none is.
    """

    z: Tensor
    r: Tensor
    dz: Tensor
    weight_rests: Mapping[int, Tensor]
    pair_weights: Mapping[int, Tensor]

    @classmethod
    def allocate(cls, inputs: FusedInputs, plan: ChunkedPlan, wanted: Wanted) -> _Buffers:
        pitch, vocab = row_pitch(inputs.vocab), inputs.vocab
        logits = Buffer((plan.rows, vocab), inputs.logit_dtype, pitch)
        dz = None
        if wanted.any and (inputs.weight_dtype != inputs.logit_dtype or plan.keeps_dz):
            dz = Buffer((plan.dz_rows, vocab), inputs.weight_dtype, pitch)
        rests: dict[int, Buffer] = {}
        pairs: dict[int, Buffer] = {}
        if plan.sums_weight:
            beside = rows_beside(vocab, inputs.weight_dtype.itemsize, inputs.logit_dtype.itemsize)
            rests = wanted.buffers(inputs.head, beside, inputs.logit_dtype)
        if plan.weight_apart:
            pairs = wanted.buffers(inputs.head, vocab, inputs.logit_dtype)
        found = memory.allocate(
            inputs.device,
            {
                "z": logits,
                "r": logits if inputs.has_reference else None,
                "dz": dz,
                **{f"rest of part {part}": buffer for part, buffer in rests.items()},
                **{f"part {part} of a pair": buffer for part, buffer in pairs.items()},
            },
            plan.budget,
        )
        z = found["z"]
        return cls(
            z=z,
            r=found.get("r", z),
            dz=found.get("dz", z),
            weight_rests={part: found[f"rest of part {part}"] for part in rests},
            pair_weights={part: found[f"part {part} of a pair"] for part in pairs},
        )


@dataclass(frozen=True)
class _ForwardBlock:
    """A block of rows whose logits are in the buffers: states (rows, state size) and values (fields, rows)."""

    rows: slice
    gathered: GatheredRows
    states: Tensor
    values: Tensor


@dataclass
class _KeptBlock:
    """A block of rows whose dz is kept.

    Attributes:
        rows: of the block.
        hidden: their hidden states.
        counted: which of them have a gradient, counted from the block's first; None: all.
        scale: what their dz was multiplied by beside, (rows, 1); None for 1.
        factor: of a long pair, what their dz lacks, set when the pair is complete; None where it lacks nothing.
    """

    rows: slice
    hidden: Tensor
    counted: Tensor | None = None
    scale: Tensor | None = None
    factor: Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.hidden)

    @property
    def lacks(self) -> Tensor | None:
        """What dz lacks of the gradient: a factor (), or one for each row, (rows, 1)."""
        if self.scale is None:
            return self.factor
        return (1 if self.factor is None else self.factor) / self.scale

    @property
    def positions(self) -> Tensor:
        if self.counted is not None:
            return self.rows.start + self.counted
        return torch.arange(self.rows.start, self.rows.stop, device=self.hidden.device)


@dataclass
class _Run:
    """A call while it runs: the same for every chunk."""

    inputs: FusedInputs
    plan: ChunkedPlan
    wanted: Wanted
    objective: PairObjective
    rows: ChunkedRows
    labels: Tensor  # in the order of the rows
    columns: Mapping[str, Tensor]
    buffers: _Buffers
    gradients: Gradients
    column_grads: dict[str, list[Tensor]] = field(default_factory=dict)  # chunk by chunk
    kept: list[_KeptBlock] = field(default_factory=list)

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
        hidden, ref_hidden = self.rows.take(inputs.hidden, rows), self.rows.take(inputs.ref_hidden, rows)
        gathered = GatheredRows(hidden, ref_hidden, self.labels[rows])
        local_states = functools.partial(
            inputs.row_states, gathered, self.vocabulary, z=self.buffers.z[:count], r=self.buffers.r[:count]
        )
        states = inputs.merge_over_ranks(count, local_states)
        return _ForwardBlock(rows, gathered, states, inputs.finalize(states, gathered.labels))

    @property
    def kept_rows(self) -> int:
        return sum(block.count for block in self.kept)

    def make_room(self, rows: int, pair: DeferredGradients | None = None) -> None:
        """Before the forward pass of rows whose dz will be kept: forms the gradients of the others, where needed."""
        overwritten = self.buffers.dz is self.buffers.z
        if overwritten or self.kept_rows + rows > self.plan.dz_rows:
            self.flush(pair)

    def keep_dz(self, block: _ForwardBlock, logps_grad: Tensor, kl_grad: Tensor) -> None:
        """Forms dz of the block whose logits are in the buffers, and keeps that of the rows with a gradient.

        The others are dropped where the host can look without waiting. Ranks of a shard exchange rows: they drop none.
        """
        kept = _KeptBlock(block.rows, block.gathered.hidden)
        dz = self.buffers.dz[self.kept_rows :][: kept.count]
        if self.inputs.is_half:
            scale = self.inputs.dz_scales(logps_grad, kl_grad, block.values)
            logps_grad, kl_grad, kept.scale = logps_grad * scale, kl_grad * scale, scale[:, None]
        self.exchange.run(
            lambda: operators.logit_gradient_out(
                self.buffers.z[: kept.count],
                self.buffers.r[: kept.count],
                block.gathered.labels,
                block.states,
                logps_grad=logps_grad,
                kl_grad=kl_grad,
                options=self.inputs.options,
                out=dz,
            ),
            lambda: None,
        )
        if self.exchange.shard is None and reading_is_free(dz.device):
            counted = ((logps_grad != 0) | (kl_grad != 0)).nonzero()[:, 0]
            if len(counted) < kept.count:
                for some in slices(len(counted), _MOVED_ROWS):  # upwards, so that no row is overwritten too early
                    dz[some] = dz[counted[some]]
                scale_of_counted = None if kept.scale is None else kept.scale[counted]
                kept = _KeptBlock(block.rows, block.gathered.hidden[counted], counted, scale_of_counted)
        if kept.count:
            self.kept.append(kept)

    def flush(self, pair: DeferredGradients | None = None) -> None:
        """Adds the share of the rows whose dz is kept to the gradients, or to those of a pair that is summed apart."""
        if not self.kept:
            return
        span = slice(self.kept[0].rows.start, self.kept[-1].rows.stop)
        rows: slice | Tensor = span
        if any(kept.counted is not None for kept in self.kept) or self.kept_rows < span.stop - span.start:
            rows = torch.cat([kept.positions for kept in self.kept])
        hidden = self.kept[0].hidden if len(self.kept) == 1 else torch.cat([block.hidden for block in self.kept])
        block, dz = Block(rows, self.vocabulary), self.buffers.dz[: self.kept_rows]
        factors = Factors([(kept.count, kept.lacks) for kept in self.kept])
        (self.gradients if pair is None else pair).add(block, hidden, dz, factors)
        self.kept.clear()


def chunked_loss(loss: PairLoss, plan: ChunkedPlan, wanted: Wanted, wanted_columns: frozenset[str]) -> Outcome:
    """Loss, sums and gradients of a batch of pairs, chunk by chunk.

    The objective is a MarginLoss where the plan has long pairs and a gradient is wanted.
    """
    inputs = loss.inputs
    rows = loss.rows.in_chunks([chunk.pairs for chunk in plan.chunks])
    buffers = _Buffers.allocate(inputs, plan, wanted)
    run = _Run(
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
        upstream = _long_pair(run, chunk) if isinstance(planned, LongPair) else _whole_pairs(run, chunk)
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


def _whole_pairs(run: _Run, chunk: Chunk) -> Upstream:
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


def _long_pair(run: _Run, pair: Chunk) -> Upstream:
    """One pair, a block of rows at a time: adds its gradients, those of a MarginLoss, where any are wanted."""
    columns = run.columns_of(pair)
    if not run.objective.differentiable:
        values = torch.cat([run.forward(rows).values for rows in _blocks(run, pair)], dim=1)
        return run.exchange.run(
            lambda: run.objective.upstream(values, pair, columns), lambda: run.objective.nothing(values, pair)
        )
    placeholders = _placeholder_values(run, pair)
    coefficients = run.exchange.run(
        lambda: run.objective.coefficients(placeholders, pair, columns),
        lambda: Coefficients(placeholders[0], placeholders[0]),
    )
    keep_until_complete = _keep_long_pair if pair.count <= run.plan.dz_rows else _sum_long_pair
    return keep_until_complete(run, pair, columns, coefficients)


def _keep_long_pair(run: _Run, pair: Chunk, columns: Mapping[str, Tensor], coefficients: Coefficients) -> Upstream:
    """Keeps the dz of all rows of a pair; its factor joins them in the products for the gradients."""
    run.make_room(pair.count)
    first_kept = len(run.kept)
    values = [_keep_block(run, rows, pair, coefficients) for rows in _blocks(run, pair)]
    upstream, factor = _completed(run, pair, torch.cat(values, dim=1), columns, coefficients)
    for kept in run.kept[first_kept:]:
        kept.factor = factor
    return upstream


def _sum_long_pair(run: _Run, pair: Chunk, columns: Mapping[str, Tensor], coefficients: Coefficients) -> Upstream:
    """Accumulates the gradients of a pair block by block without its factor, which then multiplies the sums."""
    run.flush()
    gradients = DeferredGradients(run.gradients, run.inputs, pair.rows, run.buffers.pair_weights)
    values = []
    for rows in _blocks(run, pair):
        run.make_room(rows.stop - rows.start, gradients)
        values.append(_keep_block(run, rows, pair, coefficients))
    run.flush(gradients)
    upstream, factor = _completed(run, pair, torch.cat(values, dim=1), columns, coefficients)
    gradients.commit(factor)
    return upstream


def _keep_block(run: _Run, rows: slice, pair: Chunk, coefficients: Coefficients) -> Tensor:
    """The values of a block of a long pair; its dz is kept, without the pair's factor."""
    block = run.forward(rows)
    if run.wanted.any:
        of_block = coefficients.of_rows(slice(rows.start - pair.rows.start, rows.stop - pair.rows.start))
        run.keep_dz(block, of_block.logps_grad, of_block.kl_grad)
    return block.values


def _completed(
    run: _Run, pair: Chunk, values: Tensor, columns: Mapping[str, Tensor], coefficients: Coefficients
) -> tuple[Upstream, Tensor]:
    """The loss of a pair whose values are all known, and the factor that its gradients lack."""
    upstream, factor = run.exchange.run(
        lambda: run.objective.link_upstream(values, pair, columns, coefficients),
        lambda: (run.objective.nothing(values, pair), values.new_zeros(())),
    )
    logps_grad, kl_grad = factor * coefficients.logps_grad, factor * coefficients.kl_grad
    return replace(upstream, logps_grad=logps_grad, kl_grad=kl_grad), factor


def _blocks(run: _Run, pair: Chunk) -> list[slice]:
    """The rows of a long pair, as many at a time as there are logits."""
    first = pair.rows.start
    return [slice(first + rows.start, first + rows.stop) for rows in slices(pair.count, run.plan.rows)]


def _placeholder_values(run: _Run, chunk: Chunk) -> Tensor:
    """Values before the logits are known: what a margin's coefficients may depend on, `tokens`, is right."""
    inputs, labels = run.inputs, run.labels[chunk.rows]
    values = torch.ones(operators.TOKEN_VALUES, len(labels), dtype=inputs.logit_dtype, device=inputs.device)
    values[TokenDivergence._fields.index("tokens")] = labels != inputs.options.ignore_index
    return values
