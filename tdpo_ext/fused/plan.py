"""Chooses how a fused loss cuts its work, so that logits and other temporaries stay within a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows of a streaming block: enough for matrix products at full rate, few enough to leave room for the vocabulary.
STREAMING_ROWS = 4096
# Columns of a streaming slice: below the first a matrix product is mostly overhead, whatever the budget; above the
# second slices are multiples of the third, which keeps rows of logits aligned.
_MIN_COLUMNS, _ALIGNED_FROM, _COLUMN_MULTIPLE = 256, 128, 64
# Bytes per row beside hidden states and logits: row state, values, upstream gradients, index and label.
_ROW_OVERHEAD = 128


def default_budget(device: torch.device) -> int:
    """Bytes for temporaries where the caller gives no budget.

    An eighth of what is free on a CUDA device (what torch keeps there unused included), between 256 MiB and 1.5 GiB;
    512 MiB elsewhere.
    """
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(min(max(free // 8, 256 << 20), 1536 << 20))
    return 512 << 20


def resolved_budget(budget: int | None, device: torch.device) -> int:
    """The caller's budget, checked, or the default.

    Raises:
        ValueError: `budget` is given and not positive.
    """
    if budget is not None and budget <= 0:
        raise ValueError(f"logits_budget is {budget}; it must be a positive number of bytes, or None")
    return default_budget(device) if budget is None else budget


@dataclass(frozen=True)
class ChunkedPlan:
    """Whole pairs at a time: both heads' logits are kept until the chunk's gradients are formed; no recompute.

    Attributes:
        chunks: (first, stop) of the pairs of each chunk.
        rows: rows of the largest chunk.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that the plan needs.
        reason: why, for people.
        keeps_dz: the low-precision dz of all chunks is kept, and dW is one product over all rows.
    """

    chunks: tuple[tuple[int, int], ...]
    rows: int
    budget: int
    bytes: int
    reason: str
    keeps_dz: bool = False

    def __str__(self) -> str:
        return f"chunked: {self.reason}"


@dataclass(frozen=True)
class StreamingPlan:
    """Slices of the vocabulary whose row states are merged; logits are recomputed in backward.

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
    def weight_sum(self) -> int:
        """Bytes of the float32 sum of a low-precision dW over several chunks; 0 where none is needed."""
        return self.vocab * self.width * 4 if self.needs_weight_grad and self.low_precision else 0

    def kept_dz(self, rows: int) -> int:
        """Bytes of the dz of all rows, in the weights' precision."""
        return rows * self.vocab * self.weight_bytes


def make_plan(pair_lengths: Sequence[int], sizes: Sizes, budget: int) -> ChunkedPlan | StreamingPlan:
    """The plan for pairs of `pair_lengths` rows (both responses together) within `budget` bytes."""
    rows = sum(pair_lengths)
    longest = max(pair_lengths, default=0)
    row_bytes = sizes.vocab * sizes.entry + sizes.row
    if rows * row_bytes <= budget:
        return ChunkedPlan(
            chunks=((0, len(pair_lengths)),),
            rows=rows,
            budget=budget,
            bytes=rows * row_bytes,
            reason=f"all {rows} rows fit the budget at once",
        )
    # A low-precision dW of several chunks is never summed in low precision: either the dz of all rows are kept for one
    # product, or dW is summed in float32, whichever is smaller.
    fixed = sizes.weight_sum
    keeps_dz = 0 < sizes.kept_dz(rows) <= fixed
    if keeps_dz:
        fixed = sizes.kept_dz(rows)
        row_bytes -= sizes.vocab * sizes.weight_bytes
    if longest * row_bytes <= budget - fixed:
        chunks = _balanced(pair_lengths, (budget - fixed) // row_bytes)
        most = max(sum(pair_lengths[first:stop]) for first, stop in chunks)
        return ChunkedPlan(
            chunks=chunks,
            rows=most,
            budget=budget,
            bytes=fixed + most * row_bytes,
            reason=f"{len(pair_lengths)} pairs in {len(chunks)} chunks of at most {most} rows",
            keeps_dz=keeps_dz,
        )
    if longest * row_bytes > budget:
        why = f"the logits of a pair of {longest} rows need {longest * row_bytes:,} bytes"
    else:
        why = f"chunks of whole pairs need {fixed:,} bytes for the weight gradient beside their logits"
    return streaming_plan(rows, sizes, budget, f"{why}, more than the budget of {budget:,}")


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
        bytes=fixed + columns * column_bytes,
        reason=f"{reason}; {columns} vocabulary entries at a time",
    )


def _balanced(lengths: Sequence[int], most: int) -> tuple[tuple[int, int], ...]:
    """Cuts consecutive pairs into the fewest chunks of at most `most` rows, then evens them out."""

    def cut(limit: int) -> list[tuple[int, int]]:
        chunks, first, rows = [], 0, 0
        for index, length in enumerate(lengths):
            if rows + length > limit and index > first:
                chunks.append((first, index))
                first, rows = index, 0
            rows += length
        return [*chunks, (first, len(lengths))]

    chunks = cut(most)
    even = cut(max(-(-sum(lengths) // len(chunks)) + max(lengths) // 2, max(lengths)))
    return tuple(even if len(even) == len(chunks) else chunks)
