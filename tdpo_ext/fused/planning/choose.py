"""Chooses how a fused loss cuts its work, so that logits and other temporaries stay within a budget of bytes.

All plans that fit, and those that `make_plan` allows a `MarginLoss`, are compared by the cost model of `costs.py`; the
fastest is taken. Equal calls make equal plans: nothing depends on what happens to be free. Where a plan fits the
budget, more of it never makes one that is slower by the model.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from .costs import MachineRates, forward_work, rates_of, streaming_work
from .cut import Cut, block_limits, ceil_div, chunk_limits, cut_pairs, kept_together
from .plan import ChunkedPlan, LongPair, StreamingPlan
from .sizes import Sizes, row_pitch

# Rows of a streaming block: enough for matrix products at full rate, few enough to leave room for the vocabulary.
STREAMING_ROWS = 4096
# Fewer rows than this make a matrix product that waits for the weights.
_MIN_BLOCK_ROWS = 64
# Rows of a tile of a GPU's products.
_TILE_ROWS = 128
# Columns of a streaming slice: below the first a matrix product is mostly overhead, whatever the budget; above the
# second slices are multiples of the third, which keeps rows of logits aligned.
_MIN_COLUMNS, _ALIGNED_FROM, _COLUMN_MULTIPLE = 256, 128, 64
# In how many parts the dz of all rows is kept, from which dhidden and dW are formed.
_KEPT_PARTS = (1, 2, 3, 4, 6, 8, 12, 16)


def make_plan(
    pair_lengths: Sequence[int],
    sizes: Sizes,
    budget: int,
    *,
    can_defer: bool = False,
    can_separate: bool = False,
    device_type: str = "cpu",
) -> ChunkedPlan | StreamingPlan:
    """The plan for pairs of `pair_lengths` rows (both responses together) within `budget` bytes.

    Where whole pairs do not fit, and `can_defer`, temporaries may take one dW in the logits' precision more than the
    budget: for dz that is kept, for the float32 sum of a low-precision dW, or for the dW of a pair. Only where both of
    the last are needed (several pairs too long for their dz to be kept, low-precision weights), they take half a dW
    beyond that. Where whole pairs just fit, such a plan, made for the largest budget in which they do not, may still be
    the fastest.

    Args:
        can_defer: the objective is a `MarginLoss`.
        can_separate: of the gradients only that of hidden is wanted, and the vocabulary is not sharded.
        device_type: whose rates the cost model takes.
    """
    return _make_plan(tuple(pair_lengths), sizes, budget, can_defer, can_separate, device_type)


@functools.lru_cache(maxsize=256)
def _make_plan(
    pair_lengths: tuple[int, ...], sizes: Sizes, budget: int, can_defer: bool, can_separate: bool, device_type: str
) -> ChunkedPlan | StreamingPlan:
    rows = sum(pair_lengths)
    if rows == 0 or rows * sizes.whole_row + sizes.weight_sum_of_one <= budget:
        return _forward_plan(cut_pairs(pair_lengths, rows), sizes, budget, f"all {rows} rows fit the budget at once")
    why = _why_not_at_once(pair_lengths, sizes, budget)
    forward = list(_plans_of_whole_pairs(pair_lengths, sizes, budget))
    if can_defer:
        ways = _ways_to_keep(pair_lengths, sizes)
        least = min(way.beside + max(pair_lengths) * way.row_bytes for way in ways)  # in which whole pairs fit
        forward += _deferred_plans(pair_lengths, sizes, min(budget, least - 1), why, _tile_rows(device_type))
    elif can_separate:
        forward += _separated_plans(pair_lengths, sizes, budget, why, _tile_rows(device_type))
    plan = _fastest(forward, streaming_plan(rows, sizes, budget, why), rows, sizes, rates_of(device_type, sizes))
    return replace(plan, budget=budget)


def _tile_rows(device_type: str) -> int:
    return 1 if device_type == "cpu" else _TILE_ROWS


def _why_not_at_once(pair_lengths: tuple[int, ...], sizes: Sizes, budget: int) -> str:
    longest = max(pair_lengths)
    need, beside = longest * sizes.whole_row, sizes.weight_sum
    if need > budget:
        return f"the logits of a pair of {longest} rows need {need:,} bytes, more than the budget of {budget:,}"
    if need + beside > budget:
        return (
            f"chunks of whole pairs need {beside:,} bytes for the weight gradient beside their logits, {need:,} for a "
            f"pair of {longest} rows, more than the budget of {budget:,} together"
        )
    return f"whole pairs in chunks within the budget of {budget:,} bytes would take longer"


def _fastest(
    forward: Sequence[ChunkedPlan], streamed: StreamingPlan, rows: int, sizes: Sizes, rates: MachineRates
) -> ChunkedPlan | StreamingPlan:
    """The plan that the cost model takes to be fastest; of equal ones, that with the least memory.

    Streaming takes a few rows and columns whatever the budget: more than that only where nothing else fits.
    """
    streaming_seconds = _streaming_seconds(streamed, rows, sizes, rates)
    if not forward:
        return streamed

    def seconds(plan: ChunkedPlan) -> float:
        return forward_work(sizes, rows, plan.steps).seconds(rates)

    plan = min(forward, key=lambda plan: (seconds(plan), plan.bytes))
    ratio = streaming_seconds / seconds(plan)
    if ratio < 1 and streamed.bytes <= max(streamed.budget, plan.bytes):
        return replace(streamed, reason=f"{streamed.reason}; forward gradients would take {1 / ratio:.2f}x the time")
    compared = f"; streaming would take {ratio:.2f}x the time" if plan.deferred else ""
    return replace(plan, reason=plan.reason + compared)


@dataclass(frozen=True)
class _Keeping:
    """A way to keep dz of whole pairs.

    Attributes:
        rows: whose dz is kept together; None: those whose logits are there.
        beside: bytes that this and the float32 sum of a low-precision dW need.
        row_bytes: of a row whose logits are there.
    """

    rows: int | None
    beside: int
    row_bytes: int


def _ways_to_keep(pair_lengths: tuple[int, ...], sizes: Sizes) -> Iterator[_Keeping]:
    yield _Keeping(None, sizes.weight_sum, sizes.whole_row)
    rows = sum(pair_lengths)
    for parts in _KEPT_PARTS if sizes.needs_grad else ():
        kept = ceil_div(rows, parts)
        if kept >= max(pair_lengths):
            summed = sizes.weight_sum if parts > 1 else sizes.weight_sum_of_one
            yield _Keeping(kept, kept * sizes.dz_row + summed, sizes.row_without_dz)


def _plans_of_whole_pairs(pair_lengths: tuple[int, ...], sizes: Sizes, budget: int) -> Iterator[ChunkedPlan]:
    """Several chunks of whole pairs, within the budget; none where the longest pair does not fit."""
    for way in _ways_to_keep(pair_lengths, sizes):
        most = (budget - way.beside) // way.row_bytes
        for limit in chunk_limits(pair_lengths):
            if limit <= (most if way.rows is None else min(most, way.rows)):
                cut = cut_pairs(pair_lengths, limit)
                reason = f"{len(pair_lengths)} pairs in {len(cut.chunks)} chunks of at most {cut.rows} rows"
                yield _forward_plan(cut, sizes, budget, reason, way.rows)


def _deferred_plans(
    pair_lengths: tuple[int, ...], sizes: Sizes, budget: int, why: str, tile_rows: int
) -> Iterator[ChunkedPlan]:
    """Chunks of whole pairs, and blocks of the pairs that are too long for that; none below a few rows.

    The candidates differ in the rows whose dz is kept: those of a block or of several, within the budget, or as many as
    fit beside it.
    """
    rows, longest = sum(pair_lengths), max(pair_lengths)
    fewest = min(_MIN_BLOCK_ROWS, longest)
    kept: int | None = None
    if sizes.dz_row <= sizes.accumulated_weight:
        kept = min(rows, sizes.accumulated_weight // sizes.dz_row)
        if kept < rows or sizes.is_half:  # then dW has a sum beside it
            kept = (sizes.accumulated_weight - sizes.weight_sum) // sizes.dz_row
    if budget < fewest * sizes.row_without_dz:
        return
    for limit in (*chunk_limits(pair_lengths), *block_limits(longest, tile_rows)):
        if 2 * limit < fewest or limit * sizes.row_without_dz > budget:
            continue
        cut = cut_pairs(pair_lengths, limit, tile_rows)
        reason = f"{why}; {cut.rows} rows at a time"
        if max(limit, fewest) * sizes.whole_row <= budget:
            yield _forward_plan(cut, sizes, budget, reason)
        several = min(rows, (budget - cut.rows * sizes.row_without_dz) // sizes.dz_row)
        if several >= min(rows, 2 * cut.rows):
            yield _forward_plan(cut, sizes, budget, reason, several)
        if kept is not None and kept >= cut.rows and (kept >= cut.longest or len(cut.chunks) == 1):
            yield _forward_plan(cut, sizes, budget, reason, kept)


def _separated_plans(
    pair_lengths: tuple[int, ...], sizes: Sizes, budget: int, why: str, tile_rows: int
) -> Iterator[ChunkedPlan]:
    """Blocks of the pairs that are too long for the budget, for objectives that are no `MarginLoss`."""
    longest = max(pair_lengths)
    fewest = min(_MIN_BLOCK_ROWS, longest)
    kept = 2 * longest * sizes.width * sizes.logit_bytes if sizes.needs_grad else 0
    for limit in block_limits(longest, tile_rows):
        if limit < fewest:
            continue
        cut = cut_pairs(pair_lengths, limit, tile_rows)
        plan = _forward_plan(cut, sizes, budget, f"{why}; {cut.rows} rows at a time")
        # Logits are read twice, so that dz does not overwrite them.
        beside = kept
        if sizes.needs_grad:
            beside += cut.rows * (sizes.row_without_dz + sizes.dz_row - sizes.whole_row)
        long = [length for chunk, length in zip(cut.chunks, cut.lengths) if isinstance(chunk, LongPair)]
        products = plan.steps.gradient_products + sum(ceil_div(length, cut.rows) for length in long)
        steps = replace(plan.steps, gradient_products=products, separate_rows=sum(long))
        if plan.bytes + beside <= budget:
            yield replace(plan, bytes=plan.bytes + beside, steps=steps, separates=True)


def _forward_plan(cut: Cut, sizes: Sizes, budget: int, reason: str, kept_rows: int | None = None) -> ChunkedPlan:
    """The plan of a cut: dz of up to `kept_rows` rows is kept together; None: of the rows whose logits are there."""
    dz_rows, row_bytes, beside = cut.rows, sizes.whole_row, 0
    if kept_rows is not None:
        row_bytes = sizes.row_without_dz
        dz_rows = kept_rows // cut.rows * cut.rows
        if cut.longest <= kept_rows:
            dz_rows = max(kept_together(cut.lengths, kept_rows))
        beside += dz_rows * sizes.dz_row
    steps = cut.steps(dz_rows)
    sums_weight = (sizes.weight_sum_of_one if steps.gradient_products == 1 else sizes.weight_sum) > 0
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


def _streaming_seconds(plan: StreamingPlan, rows: int, sizes: Sizes, rates: MachineRates) -> float:
    blocks, slices = ceil_div(rows, plan.rows), ceil_div(sizes.vocab, plan.columns)
    return streaming_work(sizes, rows, blocks, slices).seconds(rates)


def streaming_plan(rows: int, sizes: Sizes, budget: int, reason: str) -> StreamingPlan:
    """Blocks of rows and slices of the vocabulary whose logits, and slice of dW, fit the budget."""
    block = max(1, min(rows, STREAMING_ROWS))
    summed = sizes.grad_width * 4 if sizes.low_precision else 0
    column_bytes = block * sizes.entry + summed
    fixed = block * sizes.row + (rows * sizes.width * 4 if sizes.low_precision and sizes.needs_grad else 0)
    most = max(_MIN_COLUMNS, (budget - fixed) // column_bytes)
    columns = min(sizes.vocab, most)
    if columns >= _ALIGNED_FROM and (columns < sizes.vocab or row_pitch(columns) > most):
        columns = columns // _COLUMN_MULTIPLE * _COLUMN_MULTIPLE
    return StreamingPlan(
        rows=block,
        columns=columns,
        budget=budget,
        bytes=fixed + row_pitch(columns) * column_bytes,
        reason=f"{reason}; {columns} vocabulary entries at a time",
    )
