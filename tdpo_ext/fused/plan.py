"""Chooses how a fused loss cuts its work, so that logits and other temporaries stay within a budget of bytes.

The candidates are compared by a small cost model: matrix products at a device's rate, plus the bytes that a plan moves
beside them at the rate of its memory. Equal calls make equal plans: nothing depends on what happens to be free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .. import checks

# Rows of a streaming block: enough for matrix products at full rate, few enough to leave room for the vocabulary.
STREAMING_ROWS = 4096
# Fewer rows than this make a matrix product that waits for the weights.
_MIN_BLOCK_ROWS = 64
# Columns of a streaming slice: below the first a matrix product is mostly overhead, whatever the budget; above the
# second slices are multiples of the third, which keeps rows of logits aligned.
_MIN_COLUMNS, _ALIGNED_FROM, _COLUMN_MULTIPLE = 256, 128, 64
# Bytes per row beside hidden states and logits: row state, values, upstream gradients, index and label.
_ROW_OVERHEAD = 128
# Rows of logits are padded to a multiple of this many entries, so that an odd vocabulary does not push the products off
# their fast path; not where the padding would be a sizeable part of a row.
_PITCH, _PITCH_FROM = 64, 1024


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


def row_pitch(columns: int) -> int:
    """Entries from one row of a logits buffer to the next."""
    return columns if columns < _PITCH_FROM else -(-columns // _PITCH) * _PITCH


@dataclass(frozen=True)
class ChunkedPlan:
    """Pairs in chunks whose gradients are formed in the forward pass: four matrix products, no recompute.

    A chunk of whole pairs that fits the budget is taken at once ("chunked"). A pair that does not is a chunk of its
    own, taken `rows` rows at a time; its gradients are accumulated unscaled until its loss is known ("deferred").

    Attributes:
        chunks: (first, stop) of the pairs of each chunk.
        rows: rows at a time, at most.
        longest: rows of the longest chunk.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that the plan needs. For a `MarginLoss`, where it saves the recompute, these may be
            beyond the budget by the dW of one deferred pair, and by the float32 sum of a low-precision dW.
        reason: why, for people.
        keeps_dz: the low-precision dz of all rows is kept, and dW is one product over all of them.
    """

    chunks: tuple[tuple[int, int], ...]
    rows: int
    longest: int
    budget: int
    bytes: int
    reason: str
    keeps_dz: bool = False

    @property
    def deferred(self) -> bool:
        """Whether some pair is taken in several blocks of rows."""
        return self.longest > self.rows

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


@dataclass(frozen=True)
class Sizes:
    """What decides a plan: widths, vocabulary, bytes of an element of the weights and of a logit, and gradients."""

    vocab: int
    width: int
    ref_width: int
    weight_bytes: int
    logit_bytes: int
    needs_weight_grad: bool
    needs_grad: bool = True

    @property
    def low_precision(self) -> bool:
        """Whether logits are wider than weights, so that dz and sums need memory of their own."""
        return self.weight_bytes != self.logit_bytes

    @property
    def entry(self) -> int:
        """Bytes of a vocabulary entry of a row: both logits, and dz where it can't overwrite them."""
        return 2 * self.logit_bytes + (self.weight_bytes if self.needs_grad and self.low_precision else 0)

    @property
    def row(self) -> int:
        """Bytes of a row beside its logits: gathered hidden states and their gradient."""
        return self.weight_bytes * (2 * self.width + self.ref_width) + _ROW_OVERHEAD

    @property
    def whole_row(self) -> int:
        """Bytes of a row with its logits over the whole vocabulary."""
        return row_pitch(self.vocab) * self.entry + self.row

    @property
    def weight_sum(self) -> int:
        """Bytes of the float32 sum of a low-precision dW over several chunks; 0 where none is needed."""
        return self.accumulated_weight if self.low_precision else 0

    @property
    def accumulated_weight(self) -> int:
        """Bytes of a dW in the precision that it is accumulated in; 0 for a frozen head."""
        return self.vocab * self.width * self.logit_bytes if self.needs_weight_grad else 0

    def kept_dz(self, rows: int) -> int:
        """Bytes of the dz of all rows, in the weights' precision."""
        return rows * row_pitch(self.vocab) * self.weight_bytes


@dataclass(frozen=True)
class MachineRates:
    """What the cost model knows of a device: multiply-adds and bytes a second. Only their ratio matters."""

    products: float
    memory: float


# Two cores of an AMD EPYC with AVX-512 (benchmarks/results/bench_linear.json: 90e9 float32 multiply-adds a second by
# matmul_float32, 30e9 bytes); an H100 by its data sheet, bfloat16.
_RATES = {"cpu": MachineRates(products=90e9, memory=30e9), "cuda": MachineRates(products=350e12, memory=3e12)}


def make_plan(
    pair_lengths: Sequence[int], sizes: Sizes, budget: int, *, can_defer: bool = False, device_type: str = "cpu"
) -> ChunkedPlan | StreamingPlan:
    """The plan for pairs of `pair_lengths` rows (both responses together) within `budget` bytes.

    Args:
        can_defer: the objective is a `MarginLoss`, or no gradient is wanted.
        device_type: whose rates the cost model takes.
    """
    rows, longest = sum(pair_lengths), max(pair_lengths, default=0)
    if rows * sizes.whole_row <= budget:
        return ChunkedPlan(
            chunks=((0, len(pair_lengths)),),
            rows=rows,
            longest=rows,
            budget=budget,
            bytes=rows * sizes.whole_row,
            reason=f"all {rows} rows fit the budget at once",
        )
    chunked = _chunked_plan(pair_lengths, sizes, budget)
    if chunked is not None:
        return chunked
    need = longest * sizes.whole_row
    why = (
        f"the logits of a pair of {longest} rows need {need:,} bytes"
        if need > budget
        else (f"chunks of whole pairs need {sizes.weight_sum:,} bytes for the weight gradient beside their logits")
    )
    why += f", more than the budget of {budget:,}"
    streamed = streaming_plan(rows, sizes, budget, why)
    deferred = _deferred_plan(pair_lengths, sizes, budget, why) if can_defer else None
    if deferred is None:
        return streamed
    rates = _RATES.get(device_type, _RATES["cuda"])
    costs = {
        "deferred": _deferred_seconds(deferred, pair_lengths, sizes, rates),
        "streaming": _streaming_seconds(streamed, rows, sizes, rates),
    }
    return deferred if costs["deferred"] <= costs["streaming"] else streamed


def _chunked_plan(pair_lengths: Sequence[int], sizes: Sizes, budget: int) -> ChunkedPlan | None:
    """Several chunks of whole pairs, or None where the longest pair does not fit."""
    rows, row_bytes = sum(pair_lengths), sizes.whole_row
    # A low-precision dW of several chunks is never summed in low precision: either the dz of all rows are kept for one
    # product, or dW is summed in float32, whichever is smaller.
    fixed = sizes.weight_sum
    keeps_dz = 0 < sizes.kept_dz(rows) <= fixed
    if keeps_dz:
        fixed = sizes.kept_dz(rows)
        row_bytes -= row_pitch(sizes.vocab) * sizes.weight_bytes
    if max(pair_lengths) * row_bytes > budget - fixed:
        return None
    chunks = _balanced(pair_lengths, (budget - fixed) // row_bytes)
    most = max(sum(pair_lengths[first:stop]) for first, stop in chunks)
    return ChunkedPlan(
        chunks=chunks,
        rows=most,
        longest=most,
        budget=budget,
        bytes=fixed + most * row_bytes,
        reason=f"{len(pair_lengths)} pairs in {len(chunks)} chunks of at most {most} rows",
        keeps_dz=keeps_dz,
    )


def _deferred_plan(pair_lengths: Sequence[int], sizes: Sizes, budget: int, why: str) -> ChunkedPlan | None:
    """Chunks of whole pairs, and blocks of the pairs that are too long for that; None below a few rows."""
    most = budget // sizes.whole_row
    if most < min(_MIN_BLOCK_ROWS, max(pair_lengths)):
        return None
    chunks = _balanced(pair_lengths, most)
    longest = max(sum(pair_lengths[first:stop]) for first, stop in chunks)
    block = -(-longest // -(-longest // most))  # the longest chunk in equal blocks
    beyond = 0
    if len(chunks) > 1 or longest > block:
        beyond += sizes.weight_sum
    if len(chunks) > 1 and longest > block:
        beyond += sizes.accumulated_weight
    return ChunkedPlan(
        chunks=chunks,
        rows=block,
        longest=longest,
        budget=budget,
        bytes=block * sizes.whole_row + beyond,
        reason=f"{why}; {block} rows at a time",
    )


def _deferred_seconds(plan: ChunkedPlan, pair_lengths: Sequence[int], sizes: Sizes, rates: MachineRates) -> float:
    blocks = sum(-(-sum(pair_lengths[first:stop]) // plan.rows) for first, stop in plan.chunks)
    # Each block reads and writes the accumulated dW; each pair is added to the total.
    moved = (2 * blocks + 3 * (len(plan.chunks) > 1) * len(plan.chunks)) * sizes.accumulated_weight
    products = _products(sum(pair_lengths), sizes, recompute=False)
    return products / rates.products + moved / rates.memory


def _streaming_seconds(plan: StreamingPlan, rows: int, sizes: Sizes, rates: MachineRates) -> float:
    blocks = -(-rows // plan.rows)
    column_slices = -(-sizes.vocab // plan.columns)
    # Each block reads and writes its slice of the accumulated dW; each slice reads and writes the float32 dhidden.
    moved = 2 * (blocks - 1) * sizes.accumulated_weight + 2 * column_slices * rows * sizes.width * sizes.logit_bytes
    return _products(rows, sizes, recompute=True) / rates.products + moved / rates.memory


def _products(rows: int, sizes: Sizes, *, recompute: bool) -> int:
    """Multiply-adds of a plan's matrix products."""
    logits = sizes.width + sizes.ref_width
    gradients = sizes.needs_grad * sizes.width + sizes.needs_weight_grad * sizes.width
    return rows * sizes.vocab * (logits * (2 if recompute and sizes.needs_grad else 1) + gradients)


def streaming_plan(rows: int, sizes: Sizes, budget: int, reason: str) -> StreamingPlan:
    """Blocks of rows and slices of the vocabulary whose logits, and slice of dW, fit the budget."""
    block = max(1, min(rows, STREAMING_ROWS))
    column_bytes = block * sizes.entry + (sizes.width * 4 if sizes.weight_sum else 0)
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
