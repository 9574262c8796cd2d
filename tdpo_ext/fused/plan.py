"""Chooses how a fused loss cuts its work, so that logits and other temporaries stay within a budget of bytes.

Where whole pairs do not fit, the candidates are compared by the cost model of `costs.py`. Equal calls make equal plans:
nothing depends on what happens to be free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .. import checks
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
class ChunkedPlan:
    """Pairs in chunks whose gradients are formed in the forward pass: four matrix products, no recompute.

    A chunk of whole pairs that fits the budget is taken at once ("chunked"). A pair that does not is a chunk alone,
    taken `rows` rows at a time, with gradients that lack a factor until its loss is known ("deferred"): its dz is kept
    until then where that takes no more memory than its dW; else its dW is summed apart.

    Attributes:
        chunks: (first, stop) of the pairs of each chunk.
        rows: rows of logits at a time, at most.
        longest: rows of the longest chunk.
        dz_rows: rows whose dz is kept, at most, until dhidden and dW are formed from all of them at once.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that the plan needs. For a `MarginLoss`, where it saves the recompute, these may be
            beyond the budget: see `make_plan`.
        reason: why, for people.
        sums_weight: a low-precision dW is added to more than once, and so summed in float32.
        weight_apart: the dW of a long pair is summed apart from that of the other pairs.
    """

    chunks: tuple[tuple[int, int], ...]
    rows: int
    longest: int
    dz_rows: int
    budget: int
    bytes: int
    reason: str
    sums_weight: bool = False
    weight_apart: bool = False

    @property
    def deferred(self) -> bool:
        """Whether some pair is taken in several blocks of rows."""
        return self.longest > self.rows

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
        reason: why, for people.
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
        return ChunkedPlan(
            chunks=((0, len(pair_lengths)),),
            rows=rows,
            longest=rows,
            dz_rows=rows,
            budget=budget,
            bytes=rows * sizes.whole_row,
            reason=f"all {rows} rows fit the budget at once",
        )
    chunked = _chunked_plan(pair_lengths, sizes, budget)
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
    return _fastest(_deferred_plans(pair_lengths, sizes, budget, why), streamed, pair_lengths, sizes, device_type)


def _fastest(
    deferred: Sequence[ChunkedPlan],
    streamed: StreamingPlan,
    pair_lengths: Sequence[int],
    sizes: Sizes,
    device_type: str,
) -> ChunkedPlan | StreamingPlan:
    """The plan that the cost model takes to be fastest; of nearly equal ones, that with the least memory."""
    rates = rates_of(device_type, sizes)
    streaming_seconds = _streaming_seconds(streamed, sum(pair_lengths), sizes, rates)
    seconds = {plan: _forward_seconds(plan, pair_lengths, sizes, rates) for plan in deferred}
    least = min(seconds.values(), default=streaming_seconds)
    if not deferred or least > streaming_seconds:
        compared = f"; forward gradients would take {least / streaming_seconds:.2f}x the time" if deferred else ""
        return replace(streamed, reason=streamed.reason + compared)
    near = [plan for plan in deferred if seconds[plan] <= (1 + _WORTH_MEMORY) * least]
    plan = min(near, key=lambda plan: plan.bytes)
    compared = f"; streaming would take {streaming_seconds / seconds[plan]:.2f}x the time"
    return replace(plan, reason=plan.reason + compared)


def _chunked_plan(pair_lengths: Sequence[int], sizes: Sizes, budget: int) -> ChunkedPlan | None:
    """Several chunks of whole pairs, or None where the longest pair does not fit."""
    rows, row_bytes = sum(pair_lengths), sizes.whole_row
    # A low-precision dW of several chunks is never summed in low precision: either the dz of all rows are kept for one
    # product, or dW is summed in float32, whichever is smaller.
    fixed = sizes.weight_sum
    keeps_dz = 0 < rows * sizes.dz_row <= fixed
    if keeps_dz:
        fixed = rows * sizes.dz_row
        row_bytes = sizes.row_without_dz
    if max(pair_lengths) * row_bytes > budget - fixed:
        return None
    chunks = _balanced(pair_lengths, (budget - fixed) // row_bytes)
    most = max(_chunk_rows(chunks, pair_lengths))
    return ChunkedPlan(
        chunks=chunks,
        rows=most,
        longest=most,
        dz_rows=rows if keeps_dz else most,
        budget=budget,
        bytes=fixed + most * row_bytes,
        reason=f"{len(pair_lengths)} pairs in {len(chunks)} chunks of at most {most} rows",
        sums_weight=fixed > 0 and not keeps_dz,
    )


def _deferred_plans(pair_lengths: Sequence[int], sizes: Sizes, budget: int, why: str) -> list[ChunkedPlan]:
    """Chunks of whole pairs, and blocks of the pairs that are too long for that; none below a few rows.

    The candidates differ in the rows whose dz is kept: those of a block, within the budget, or as many as fit beside.
    """
    plans = [_deferred_plan(pair_lengths, sizes, budget, why, sizes.whole_row, 0)]
    if sizes.dz_row <= sizes.accumulated_weight:
        rows = sum(pair_lengths)
        kept = sizes.accumulated_weight // sizes.dz_row
        if kept < rows:  # then dW is added to more than once
            kept = (sizes.accumulated_weight - sizes.weight_sum) // sizes.dz_row
        plans.append(_deferred_plan(pair_lengths, sizes, budget, why, sizes.row_without_dz, min(kept, rows)))
    return [plan for plan in plans if plan is not None]


def _deferred_plan(
    pair_lengths: Sequence[int], sizes: Sizes, budget: int, why: str, row_bytes: int, kept: int
) -> ChunkedPlan | None:
    """One of them: `kept` rows of dz are kept beside the budget; 0: those of a block are part of `row_bytes`."""
    most = budget // row_bytes
    longest = max(pair_lengths)
    if most < min(_MIN_BLOCK_ROWS, longest):
        return None
    chunks = _balanced(pair_lengths, most)
    chunk_rows = _chunk_rows(chunks, pair_lengths)
    longest = max(chunk_rows)
    block = -(-longest // -(-longest // most))  # the longest chunk in equal blocks
    if 0 < kept < min(block, longest) or (kept and longest > kept and len(chunks) > 1):
        return None  # dz of a pair must be kept whole, or its dW needs memory of its own
    dz_rows = block
    if kept:
        dz_rows = max(kept_together(chunk_rows, kept)) if longest <= kept else kept // block * block
    plan = ChunkedPlan(
        chunks=chunks,
        rows=block,
        longest=longest,
        dz_rows=dz_rows,
        budget=budget,
        bytes=0,
        reason=f"{why}; {block} rows at a time",
    )
    steps = _steps(plan, chunk_rows)
    plan = replace(
        plan,
        sums_weight=sizes.weight_sum > 0 and steps.gradient_products > 1,
        weight_apart=sizes.needs_weight_grad and steps.pairs_apart > 0,
    )
    beside = dz_rows * sizes.dz_row if kept else 0
    beside += sizes.weight_sum * plan.sums_weight + sizes.accumulated_weight * plan.weight_apart
    return replace(plan, bytes=block * row_bytes + beside)


def kept_together(chunk_rows: Sequence[int], most: int) -> list[int]:
    """Rows whose dz are kept together, where chunks of at most `most` rows are kept until the next would not fit."""
    kept: list[int] = []
    for rows in chunk_rows:
        if kept and kept[-1] + rows <= most:
            kept[-1] += rows
        else:
            kept.append(rows)
    return kept


def _chunk_rows(chunks: Sequence[tuple[int, int]], pair_lengths: Sequence[int]) -> list[int]:
    return [sum(pair_lengths[first:stop]) for first, stop in chunks]


def _steps(plan: ChunkedPlan, chunk_rows: Sequence[int]) -> ForwardSteps:
    blocks = sum(-(-rows // plan.rows) for rows in chunk_rows)
    if not plan.keeps_dz:
        apart = sum(rows > plan.rows for rows in chunk_rows) if len(chunk_rows) > 1 else 0
        return ForwardSteps(blocks, blocks, apart)
    if plan.longest > plan.dz_rows:
        return ForwardSteps(blocks, -(-sum(chunk_rows) // plan.dz_rows), 0)
    return ForwardSteps(blocks, len(kept_together(chunk_rows, plan.dz_rows)), 0)


def _forward_seconds(plan: ChunkedPlan, pair_lengths: Sequence[int], sizes: Sizes, rates: MachineRates) -> float:
    steps = _steps(plan, _chunk_rows(plan.chunks, pair_lengths))
    return forward_work(sizes, sum(pair_lengths), steps).seconds(rates)


def _streaming_seconds(plan: StreamingPlan, rows: int, sizes: Sizes, rates: MachineRates) -> float:
    blocks, slices = -(-rows // plan.rows), -(-sizes.vocab // plan.columns)
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
    even = cut(min(most, max(-(-sum(lengths) // len(chunks)) + longest // 2, longest)))
    return tuple(even if len(even) == len(chunks) else chunks)
