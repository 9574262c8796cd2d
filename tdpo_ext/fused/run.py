"""A call whose gradients are formed in the forward pass, while it runs: its buffers, and the dz that is kept.

Products for gradients are taken over all rows whose dz is kept, since each reads a whole weight matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..ops import memory
from ..ops.memory import Buffer
from ..vocab_parallel import Exchange
from .blocks import Block, Factors, slices
from .gradients import DeferredGradients, Gradients, Wanted
from .inputs import FusedInputs, GatheredRows
from .objective_gradient import PairObjective
from .planning.plan import ChunkedPlan
from .planning.sizes import row_pitch, rows_beside
from .rows import Chunk, ChunkedRows, reading_is_free

_MOVED_ROWS = 16  # rows of dz moved at a time into the places of rows without a gradient


@dataclass(frozen=True)
class Buffers:
    """Scratch memory of a call.

    Attributes:
        z, r: policy and reference logits of a block; the same where there is no reference.
        dz: of the rows whose dz is kept; in the memory of `z` where those are a block's.
        dz_in_place: whether it is there.
        weight_rests: of each part of the head that wants a gradient, by its place, what the memory of a low-precision
            dW does not hold of its sum; empty where it is not summed.
        pair_weights: of each such part, dW of a pair that is summed apart; empty where none is.
    """

    z: Tensor
    r: Tensor
    dz: Tensor
    dz_in_place: bool
    weight_rests: Mapping[int, Tensor]
    pair_weights: Mapping[int, Tensor]

    @classmethod
    def allocate(cls, inputs: FusedInputs, plan: ChunkedPlan, wanted: Wanted) -> Buffers:
        pitch, vocab = row_pitch(inputs.vocab), inputs.vocab
        logits = Buffer((plan.rows, vocab), inputs.logit_dtype, pitch)
        in_place = inputs.dz_in_place and not (plan.keeps_dz or plan.separates)
        dz = None if in_place or not wanted.any else Buffer((plan.dz_rows, vocab), inputs.weight_dtype, pitch)
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
            dz=found["dz"] if "dz" in found else inputs.dz_over(z),
            dz_in_place=in_place,
            weight_rests={part: found[f"rest of part {part}"] for part in rests},
            pair_weights={part: found[f"part {part} of a pair"] for part in pairs},
        )


@dataclass(frozen=True)
class ForwardBlock:
    """A block of rows whose logits are in the buffers: states (rows, state size) and values (fields, rows)."""

    rows: slice
    gathered: GatheredRows
    states: Tensor
    values: Tensor


@dataclass
class KeptBlock:
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
class Run:
    """A call while it runs: the same for every chunk."""

    inputs: FusedInputs
    plan: ChunkedPlan
    wanted: Wanted
    objective: PairObjective
    rows: ChunkedRows
    labels: Tensor  # in the order of the rows
    columns: Mapping[str, Tensor]
    buffers: Buffers
    gradients: Gradients
    column_grads: dict[str, list[Tensor]] = field(default_factory=dict)  # chunk by chunk
    kept: list[KeptBlock] = field(default_factory=list)

    @property
    def exchange(self) -> Exchange:
        return self.inputs.exchange

    @property
    def vocabulary(self) -> slice:
        return slice(0, self.inputs.vocab)

    def columns_of(self, chunk: Chunk) -> dict[str, Tensor]:
        return {name: column[chunk.rows] for name, column in self.columns.items()}

    def forward(self, rows: slice) -> ForwardBlock:
        """Row states and values of a block of rows; leaves their logits in the buffers."""
        inputs, count = self.inputs, rows.stop - rows.start
        hidden, ref_hidden = self.rows.take(inputs.hidden, rows), self.rows.take(inputs.ref_hidden, rows)
        gathered = GatheredRows(hidden, ref_hidden, self.labels[rows])
        local_states = functools.partial(
            inputs.row_states, gathered, self.vocabulary, z=self.buffers.z[:count], r=self.buffers.r[:count]
        )
        states = inputs.merge_over_ranks(count, local_states)
        return ForwardBlock(rows, gathered, states, inputs.finalize(states, gathered.labels))

    @property
    def kept_rows(self) -> int:
        return sum(block.count for block in self.kept)

    def make_room(self, rows: int, pair: DeferredGradients | None = None) -> None:
        """Before the forward pass of rows whose dz will be kept: forms the gradients of the others, where needed."""
        if self.buffers.dz_in_place or self.kept_rows + rows > self.plan.dz_rows:
            self.flush(pair)

    def keep_dz(self, block: ForwardBlock, logps_grad: Tensor, kl_grad: Tensor) -> None:
        """Forms dz of the block whose logits are in the buffers, and keeps that of the rows with a gradient.

        The others are dropped where the host can look without waiting. Ranks of a shard exchange rows: they drop none.
        """
        kept = KeptBlock(block.rows, block.gathered.hidden)
        dz = self.buffers.dz[self.kept_rows :][: kept.count]
        kept.scale = self.form_dz(block, logps_grad, kl_grad, dz)
        if self.exchange.shard is None and reading_is_free(dz.device):
            counted = ((logps_grad != 0) | (kl_grad != 0)).nonzero()[:, 0]
            if len(counted) < kept.count:
                for some in slices(len(counted), _MOVED_ROWS):  # upwards, so that no row is overwritten too early
                    dz[some] = dz[counted[some]]
                scale_of_counted = None if kept.scale is None else kept.scale[counted]
                kept = KeptBlock(block.rows, block.gathered.hidden[counted], counted, scale_of_counted)
        if kept.count:
            self.kept.append(kept)

    def form_dz(self, block: ForwardBlock, logps_grad: Tensor, kl_grad: Tensor, dz: Tensor) -> Tensor | None:
        """Forms dz of the block whose logits are in the buffers; returns what it was multiplied by, (rows, 1), or
        None for 1."""
        scale, count = None, len(dz)
        if self.inputs.is_half:
            of_rows = self.inputs.dz_scales(logps_grad, kl_grad, block.values)
            logps_grad, kl_grad, scale = logps_grad * of_rows, kl_grad * of_rows, of_rows[:, None]
        self.exchange.run(
            lambda: self.inputs.write_dz(
                self.buffers.z[:count],
                self.buffers.r[:count],
                block.gathered.labels,
                block.states,
                logps_grad=logps_grad,
                kl_grad=kl_grad,
                first_column=0,
                out=dz,
            ),
            lambda: None,
        )
        return scale

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
