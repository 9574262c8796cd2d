"""Chooses how a fused loss cuts its work, so that logits and other temporaries stay within a budget of bytes.

Where whole pairs do not fit, the candidates are compared by the cost model of `costs.py`. Equal calls make equal plans:
nothing depends on what happens to be free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ... import checks
from .costs import ForwardSteps, MachineRates, forward_work, rates_of, streaming_work
from .sizes import Sizes, row_pitch

# Rows of a streaming block: enough for matrix products at full rate, few enough to leave room for the vocabulary.
STREAMING_ROWS = 4096
# Fewer rows than this make a matrix product that waits for the weights.
_MIN_BLOCK_ROWS = 64
# Columns of a streaming slice: below the first a matrix product is mostly overhead, whatever the budget; above the
# second slices are multiples of the third, which keeps rows of logits aligned.
_MIN_COLUMNS, _ALIGNED_FROM, _COLUMN_MULTIPLE = 256, 128, 64
# A plan that is faster by less than this share, as far as the cost model can tell, is not worth more memory.
_WORTH_MEMORY = 0.03


def default_budget(device: torch.device) -> int:
    """Bytes for temporaries where the caller gives no budget.

    A twelfth of a CUDA device's memory, between 256 MiB and 5 GiB; 512 MiB elsewhere. With 5 GiB, 4,096 rows of a
    128,256-entry vocabulary are one chunk.
    """
    if device.type == "cuda":
        return cuda_budget(torch.cuda.get_device_properties(device).total_memory)
    return 512 << 20


def cuda_budget(total_memory: int) -> int:
    """The default budget of a CUDA device with this many bytes."""
    return min(max(total_memory // 12, 256 << 20), 5 << 30)


def resolved_budget(budget: int | None, device: torch.device) -> int:
    """The caller's budget, checked, or the default.

    Raises:
        TypeError, ValueError: `budget` is given and no positive integer.
    """
    return default_budget(device) if budget is None else check_budget(budget)


def check_budget(budget: int) -> int:
    """`budget`, once it is known to be a positive integer."""
    return checks.integer("logits_budget", budget, least=1)


@dataclass(frozen=True)
class WholePairs:
    """Consecutive pairs, `first` to `stop`, whose logits are there together: their gradients are formed at once."""

    first: int
    stop: int

    @property
    def pairs(self) -> range:
        return range(self.first, self.stop)


@dataclass(frozen=True)
class LongPair:
    """One pair, taken a block of rows at a time: its gradients wait for a factor that belongs to this pair alone."""

    pair: int

    @property
    def pairs(self) -> range:
        return range(self.pair, self.pair + 1)


@dataclass(frozen=True)
class ChunkedPlan:
    """Pairs in chunks whose gradients are formed in the forward pass: four matrix products, no recompute.

    A chunk of whole pairs that fits the budget is taken at once ("chunked"). A pair that does not is a chunk alone,
    taken `rows` rows at a time, with gradients that lack a factor until its loss is known ("deferred"): its dz is kept
    until then where that takes no more memory than its dW; else its dW is summed apart.

    Attributes:
        chunks: all pairs, in order.
        rows: rows of logits at a time, at most; a chunk of whole pairs has no more.
        dz_rows: rows whose dz is kept, at most, until dhidden and dW are formed from all of them at once.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that the plan needs. For a `MarginLoss`, where it saves the recompute, these may be
            beyond the budget: see `make_plan`.
        reason: human-readable reason for this plan.
        steps: how often it takes its products, for the cost model.
        sums_weight: a low-precision dW is added to more than once, and so summed in float32.
        weight_apart: the dW of a long pair is summed apart from that of the other pairs.
    """

    chunks: tuple[WholePairs | LongPair, ...]
    rows: int
    dz_rows: int
    budget: int
    bytes: int
    reason: str
    steps: ForwardSteps
    sums_weight: bool = False
    weight_apart: bool = False

    @property
    def deferred(self) -> bool:
        """Whether some pair is taken in several blocks of rows."""
        return any(isinstance(chunk, LongPair) for chunk in self.chunks)

    @property
    def keeps_dz(self) -> bool:
        """Whether dz of more rows is kept than there are logits of."""
        return self.dz_rows > self.rows

    def __str__(self) -> str:
        return f"{'deferred' if self.deferred else 'chunked'}: {self.reason}"


@dataclass(frozen=True)
class StreamingPlan:
    """Slices of the vocabulary whose row states are merged; logits are recomputed for the gradients.

    Attributes:
        rows: rows of a block, at most.
        columns: vocabulary entries of a slice, at most.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that the plan needs.
        reason: human-readable reason for this plan.
    """

    rows: int
    columns: int
    budget: int
    bytes: int
    reason: str

    def __str__(self) -> str:
        return f"streaming: {self.reason}"


def make_plan(
    pair_lengths: Sequence[int], sizes: Sizes, budget: int, *, can_defer: bool = False, device_type: str = "cpu"
) -> ChunkedPlan | StreamingPlan:
    """The plan for pairs of `pair_lengths` rows (both responses together) within `budget` bytes.

    Where whole pairs do not fit, and `can_defer`, temporaries may take one dW in the logits' precision more than the
    budget: for dz that is kept, for the float32 sum of a low-precision dW, or for the dW of a pair. Only where both of
    the last are needed (several pairs too long for their dz to be kept, low-precision weights), they take half a dW
    beyond that.

    Args:
        can_defer: the objective is a `MarginLoss`.
        device_type: whose rates the cost model takes.
    """
    rows = sum(pair_lengths)
    if rows * sizes.whole_row <= budget:
        return _forward_plan(_cut(pair_lengths, rows), sizes, budget, f"all {rows} rows fit the budget at once")
    chunked = _plan_of_whole_pairs(pair_lengths, sizes, budget)
    if chunked is not None:
        return chunked
    longest = max(pair_lengths)
    need = longest * sizes.whole_row
    why = (
        f"the logits of a pair of {longest} rows need {need:,} bytes"
        if need > budget
        else f"chunks of whole pairs need {sizes.weight_sum:,} bytes for the weight gradient beside their logits"
    )
    why += f", more than the budget of {budget:,}"
    streamed = streaming_plan(rows, sizes, budget, why)
    if not can_defer:
        return streamed
    return _fastest(_deferred_plans(pair_lengths, sizes, budget, why), streamed, rows, sizes, device_type)


def _fastest(
    deferred: Sequence[ChunkedPlan], streamed: StreamingPlan, rows: int, sizes: Sizes, device_type: str
) -> ChunkedPlan | StreamingPlan:
    """The plan that the cost model takes to be fastest; of nearly equal ones, that with the least memory."""
    rates = rates_of(device_type, sizes)
    streaming_seconds = _streaming_seconds(streamed, rows, sizes, rates)
    seconds = {plan: forward_work(sizes, rows, plan.steps).seconds(rates) for plan in deferred}
    least = min(seconds.values(), default=streaming_seconds)
    if not deferred or least > streaming_seconds:
        compared = f"; forward gradients would take {least / streaming_seconds:.2f}x the time" if deferred else ""
        return replace(streamed, reason=streamed.reason + compared)
    near = [plan for plan in deferred if seconds[plan] <= (1 + _WORTH_MEMORY) * least]
    plan = min(near, key=lambda plan: plan.bytes)
    compared = f"; streaming would take {streaming_seconds / seconds[plan]:.2f}x the time"
    return replace(plan, reason=plan.reason + compared)


def _plan_of_whole_pairs(pair_lengths: Sequence[int], sizes: Sizes, budget: int) -> ChunkedPlan | None:
    """Several chunks of whole pairs, or None where the longest pair does not fit."""
    rows = sum(pair_lengths)
    # A low-precision dW of several chunks is never summed in low precision: either the dz of all rows are kept for one
    # product, or dW is summed in float32, whichever is smaller.
    beside, row_bytes, kept_rows = sizes.weight_sum, sizes.whole_row, None
    if 0 < rows * sizes.dz_row <= sizes.weight_sum:
        beside, row_bytes, kept_rows = rows * sizes.dz_row, sizes.row_without_dz, rows
    limit = (budget - beside) // row_bytes
    if max(pair_lengths) > limit:
        return None
    cut = _cut(pair_lengths, limit)
    reason = f"{len(pair_lengths)} pairs in {len(cut.chunks)} chunks of at most {cut.rows} rows"
    return _forward_plan(cut, sizes, budget, reason, kept_rows)


def _deferred_plans(pair_lengths: Sequence[int], sizes: Sizes, budget: int, why: str) -> list[ChunkedPlan]:
    """Chunks of whole pairs, and blocks of the pairs that are too long for that; none below a few rows.

    The candidates differ in the rows whose dz is kept: those of a block, within the budget, or as many as fit beside.
    """
    fewest = min(_MIN_BLOCK_ROWS, max(pair_lengths))
    plans = []
    if budget // sizes.whole_row >= fewest:
        cut = _cut(pair_lengths, budget // sizes.whole_row)
        plans.append(_forward_plan(cut, sizes, budget, f"{why}; {cut.rows} rows at a time"))
    if budget // sizes.row_without_dz >= fewest and sizes.dz_row <= sizes.accumulated_weight:
        cut = _cut(pair_lengths, budget // sizes.row_without_dz)
        rows = sum(pair_lengths)
        kept_rows = min(rows, sizes.accumulated_weight // sizes.dz_row)
        if kept_rows < rows:  # then dW is added to more than once
            kept_rows = (sizes.accumulated_weight - sizes.weight_sum) // sizes.dz_row
        if kept_rows >= cut.rows and (kept_rows >= cut.longest or len(cut.chunks) == 1):
            plans.append(_forward_plan(cut, sizes, budget, f"{why}; {cut.rows} rows at a time", kept_rows))
    return plans


@dataclass(frozen=True)
class _Cut:
    """Pairs in chunks: the rows of each chunk, and the rows of logits at a time."""

    chunks: tuple[WholePairs | LongPair, ...]
    lengths: tuple[int, ...]
    rows: int

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def steps(self, dz_rows: int) -> ForwardSteps:
        """How often the products are taken where dz of at most `dz_rows` rows is kept."""
        blocks = sum(_ceil_div(length, self.rows) for length in self.lengths if length)
        if dz_rows <= self.rows:
            apart = sum(isinstance(chunk, LongPair) for chunk in self.chunks) if len(self.chunks) > 1 else 0
            return ForwardSteps(blocks, blocks, apart)
        if self.longest > dz_rows:
            return ForwardSteps(blocks, _ceil_div(sum(self.lengths), dz_rows), 0)
        return ForwardSteps(blocks, len(_kept_together(self.lengths, dz_rows)), 0)


def _cut(pair_lengths: Sequence[int], limit: int) -> _Cut:
    """Whole pairs in chunks of at most `limit` rows; longer pairs in blocks, equal ones of the longest."""
    spans = _balanced(pair_lengths, limit)
    lengths = tuple(sum(pair_lengths[first:stop]) for first, stop in spans)
    chunks = tuple(
        LongPair(first) if length > limit else WholePairs(first, stop) for (first, stop), length in zip(spans, lengths)
    )
    whole = [length for length in lengths if length <= limit]
    longest = max(lengths)
    block = _ceil_div(longest, _ceil_div(longest, limit)) if longest > limit else 0
    return _Cut(chunks, lengths, max(block, *whole, 0))


def _forward_plan(cut: _Cut, sizes: Sizes, budget: int, reason: str, kept_rows: int | None = None) -> ChunkedPlan:
    """The plan of a cut: dz of up to `kept_rows` rows is kept together; None: of the rows whose logits are there."""
    dz_rows, row_bytes, beside = cut.rows, sizes.whole_row, 0
    if kept_rows is not None:
        row_bytes = sizes.row_without_dz
        dz_rows = kept_rows // cut.rows * cut.rows
        if cut.longest <= kept_rows:
            dz_rows = max(_kept_together(cut.lengths, kept_rows))
        beside += dz_rows * sizes.dz_row
    steps = cut.steps(dz_rows)
    sums_weight = sizes.weight_sum > 0 and steps.gradient_products > 1
    weight_apart = sizes.needs_weight_grad and steps.pairs_apart > 0
    if sums_weight:
        beside += sizes.weight_sum
    if weight_apart:
        beside += sizes.accumulated_weight
    return ChunkedPlan(
        chunks=cut.chunks,
        rows=cut.rows,
        dz_rows=dz_rows,
        budget=budget,
        bytes=cut.rows * row_bytes + beside,
        reason=reason,
        steps=steps,
        sums_weight=sums_weight,
        weight_apart=weight_apart,
    )


def _kept_together(lengths: Sequence[int], most: int) -> list[int]:
    """Rows whose dz are kept together, where chunks of at most `most` rows are kept until the next would not fit."""
    kept: list[int] = []
    for rows in lengths:
        if kept and kept[-1] + rows <= most:
            kept[-1] += rows
        else:
            kept.append(rows)
    return kept


def _ceil_div(total: int, size: int) -> int:
    return -(-total // size)


def _streaming_seconds(plan: StreamingPlan, rows: int, sizes: Sizes, rates: MachineRates) -> float:
    blocks, slices = _ceil_div(rows, plan.rows), _ceil_div(sizes.vocab, plan.columns)
    return streaming_work(sizes, rows, blocks, slices).seconds(rates)


def streaming_plan(rows: int, sizes: Sizes, budget: int, reason: str) -> StreamingPlan:
    """Blocks of rows and slices of the vocabulary whose logits, and slice of dW, fit the budget."""
    block = max(1, min(rows, STREAMING_ROWS))
    summed = sizes.low_precision and sizes.needs_weight_grad
    column_bytes = block * sizes.entry + (sizes.width * 4 if summed else 0)
    fixed = block * sizes.row + (rows * sizes.width * 4 if sizes.low_precision else 0)
    columns = min(sizes.vocab, max(_MIN_COLUMNS, (budget - fixed) // column_bytes))
    if _ALIGNED_FROM <= columns < sizes.vocab:
        columns = columns // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE
    return StreamingPlan(
        rows=block,
        columns=columns,
        budget=budget,
        bytes=fixed + row_pitch(columns) * column_bytes,
        reason=f"{reason}; {columns} vocabulary entries at a time",
    )


def _balanced(lengths: Sequence[int], most: int) -> tuple[tuple[int, int], ...]:
    """Cuts consecutive pairs into the fewest chunks of at most `most` rows, then evens them out.

    A pair of more than `most` rows is a chunk of its own.
    """

    def cut(limit: int) -> list[tuple[int, int]]:
        chunks, first, rows = [], 0, 0
        for index, length in enumerate(lengths):
            if rows + length > limit and index > first:
                chunks.append((first, index))
                first, rows = index, 0
            rows += length
        return [*chunks, (first, len(lengths))]

    chunks = cut(most)
    longest = max(lengths)
    even = cut(min(most, max(_ceil_div(sum(lengths), len(chunks)) + longest // 2, longest)))
    return tuple(even if len(even) == len(chunks) else chunks)
