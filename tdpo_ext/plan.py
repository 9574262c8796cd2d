"""Chooses how the fused losses cut their work so that logits and other temporaries stay within a budget of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Rows of a streaming block: enough for matrix products at full rate, few enough to leave room for the vocabulary.
STREAMING_ROWS = 4096
_STREAMING_MIN_COLUMNS = 256


def default_budget(device: torch.device) -> int:
    """Bytes for temporaries where the caller gives no budget: an eighth of what is free on a CUDA device (what torch
    keeps there unused included), between 256 MiB and 1.5 GiB; 512 MiB elsewhere."""
    if device.type == "cuda":
        free, _total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(min(max(free // 8, 256 << 20), 1536 << 20))
    return 512 << 20


def budget_or_default(budget: int | None, device: torch.device) -> int:
    """The caller's budget, once it is found good, or the default.

    Raises:
        ValueError: `budget` is given and not positive.
    """
    if budget is not None and budget <= 0:
        raise ValueError(f"logits_budget is {budget}; it must be a positive number of bytes, or None")
    return default_budget(device) if budget is None else budget


@dataclass(frozen=True)
class Plan:
    """What was chosen, and why.

    Attributes:
        kind: "resident" (whole pairs at a time, both heads' logits kept, no recompute) or "streaming" (slices of the
            vocabulary, logits recomputed in backward).
        pairs: resident: (first, stop) of the pairs in every chunk.
        rows: rows at a time, at most.
        columns: vocabulary entries at a time.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that this plan needs.
        keeps_dz: resident: a low-precision dz of all chunks is kept until dW is formed from it, once.
        reason: one sentence.
    """

    kind: str
    pairs: tuple[tuple[int, int], ...]
    rows: int
    columns: int
    budget: int
    bytes: int
    reason: str
    keeps_dz: bool = False

    def __str__(self) -> str:
        return f"{self.kind}: {self.reason}"


@dataclass(frozen=True)
class Costs:
    """Sizes that decide a plan. `element` is the bytes of an element of the weights, `logit` that of a logit."""

    vocab: int
    width: int
    ref_width: int
    element: int
    logit: int
    needs_weight_grad: bool
    needs_grad: bool = True

    @property
    def entry(self) -> int:
        """Bytes a vocabulary entry of a row takes: both logits, and dz where it can't overwrite them."""
        return 2 * self.logit + (self.element if self.needs_grad and self.element != self.logit else 0)

    @property
    def row(self) -> int:
        """Bytes of the gathered hidden states of a row and of their gradient."""
        return self.element * (2 * self.width + self.ref_width) + 128

    @property
    def weight_accumulator(self) -> int:
        """Bytes of a float32 dW beside the gradient, where chunks are summed into the gradient of low-precision
        weights; 0 where nothing of the kind is needed."""
        return self.vocab * self.width * 4 if self.needs_weight_grad and self.element != self.logit else 0

    def kept_dz(self, rows: int) -> int:
        """Bytes of the dz of all rows, in the weights' precision."""
        return rows * self.vocab * self.element


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


def make_plan(lengths: Sequence[int], costs: Costs, budget: int | None, device: torch.device) -> Plan:
    """The plan for pairs with `lengths` rows each (both responses together).

    Raises:
        ValueError: `budget` is given and not positive.
    """
    budget = budget_or_default(budget, device)
    rows = sum(lengths)
    longest = max(lengths, default=0)
    row_bytes = costs.vocab * costs.entry + costs.row
    if rows * row_bytes <= budget:
        whole = ((0, len(lengths)),)
        reason = f"all {rows} rows fit the budget at once"
        return Plan("resident", whole, rows, costs.vocab, budget, rows * row_bytes, reason)
    # Low-precision gradients of several chunks are not summed in low precision: either all dz wait for one product, or
    # dW is summed in float32, whichever is smaller.
    fixed = costs.weight_accumulator
    keeps_dz = 0 < costs.kept_dz(rows) <= fixed
    if keeps_dz:
        fixed = costs.kept_dz(rows)
        row_bytes -= costs.vocab * costs.element
    if longest * row_bytes <= budget - fixed:
        pairs = _balanced(lengths, (budget - fixed) // row_bytes)
        most = max(sum(lengths[first:stop]) for first, stop in pairs)
        reason = f"{len(lengths)} pairs in {len(pairs)} chunks of at most {most} rows"
        return Plan("resident", pairs, most, costs.vocab, budget, fixed + most * row_bytes, reason, keeps_dz)
    why = (
        f"a pair of {longest} rows needs {longest * row_bytes:,} bytes of logits"
        if longest * row_bytes > budget
        else f"chunks of whole pairs need {fixed:,} bytes for the weight gradient beside their logits"
    )
    return streaming_plan(rows, costs, budget, why)


def streaming_plan(rows: int, costs: Costs, budget: int, why: str) -> Plan:
    """Blocks of rows and slices of the vocabulary whose logits, and slice of dW, fit the budget."""
    block = max(1, min(rows, STREAMING_ROWS))
    column_bytes = block * costs.entry + (costs.width * 4 if costs.weight_accumulator else 0)
    left = budget - block * costs.row - (rows * costs.width * 4 if costs.element != costs.logit else 0)
    columns = min(costs.vocab, max(_STREAMING_MIN_COLUMNS, left // column_bytes))
    if columns >= 128:
        columns = columns // 64 * 64 if columns < costs.vocab else columns
    needed = columns * column_bytes + (budget - left)
    reason = f"{why}, more than the budget of {budget:,}; {columns} vocabulary entries at a time"
    return Plan("streaming", (), block, columns, budget, needed, reason)
