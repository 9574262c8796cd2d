"""Cuts pairs into chunks, and long pairs into blocks of rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from .costs import ForwardSteps
from .plan import LongPair, WholePairs


@dataclass(frozen=True)
class Cut:
    """Pairs in chunks: the rows of each chunk, and the rows of logits at a time."""

    chunks: tuple[WholePairs | LongPair, ...]
    lengths: tuple[int, ...]
    rows: int

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def steps(self, dz_rows: int) -> ForwardSteps:
        """How often the products are taken where dz of at most `dz_rows` rows is kept."""
        together = kept_together(self.lengths, dz_rows) if dz_rows > self.rows else self.lengths
        products = apart = 0
        for rows in filter(None, together):
            is_long = rows > dz_rows  # one pair, whose dW is its own until it is complete
            products += ceil_div(rows, dz_rows // self.rows * self.rows) if is_long else 1
            apart += is_long and len(self.chunks) > 1
        blocks = sum(ceil_div(length, self.rows) for length in self.lengths if length)
        return ForwardSteps(blocks, products, apart)


@functools.lru_cache(maxsize=1024)
def cut_pairs(pair_lengths: tuple[int, ...], limit: int, multiple: int = 1) -> Cut:
    """Whole pairs in chunks of at most `limit` rows; longer pairs in blocks, equal ones of the longest.

    Args:
        multiple: of rows, which blocks have where the limit allows it.
    """
    spans = _balanced(pair_lengths, limit)
    lengths = tuple(sum(pair_lengths[first:stop]) for first, stop in spans)
    chunks = tuple(
        LongPair(first) if length > limit else WholePairs(first, stop) for (first, stop), length in zip(spans, lengths)
    )
    whole = [length for length in lengths if length <= limit]
    longest = max(lengths)
    block = 0
    if longest > limit:
        multiple = multiple if limit >= multiple else 1
        equal = ceil_div(longest, ceil_div(longest, limit // multiple * multiple))
        block = ceil_div(equal, multiple) * multiple
    return Cut(chunks, lengths, max(block, *whole, 0))


def kept_together(lengths: Sequence[int], most: int) -> list[int]:
    """Rows whose dz are kept together, where chunks of at most `most` rows are kept until the next would not fit."""
    kept: list[int] = []
    for rows in lengths:
        if kept and kept[-1] + rows <= most:
            kept[-1] += rows
        else:
            kept.append(rows)
    return kept


def ceil_div(total: int, size: int) -> int:
    return -(-total // size)


def _greedy(lengths: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Consecutive pairs in the fewest chunks of at most `limit` rows; a longer pair is a chunk of its own."""
    chunks, first, rows = [], 0, 0
    for index, length in enumerate(lengths):
        if rows + length > limit and index > first:
            chunks.append((first, index))
            first, rows = index, 0
        rows += length
    return [*chunks, (first, len(lengths))]


def _balanced(lengths: Sequence[int], most: int) -> tuple[tuple[int, int], ...]:
    """Cuts consecutive pairs into the fewest chunks of at most `most` rows, then evens them out.

    A pair of more than `most` rows is a chunk of its own.
    """
    chunks = _greedy(lengths, most)
    longest = max(lengths)
    even = _greedy(lengths, min(most, max(ceil_div(sum(lengths), len(chunks)) + longest // 2, longest)))
    return tuple(even if len(even) == len(chunks) else chunks)


def _counts(most: int) -> list[int]:
    """Numbers of chunks or blocks to try: all small ones, then every tenth more."""
    counts = [*range(1, min(most, 32) + 1)]
    while counts[-1] < most:
        counts.append(min(most, ceil_div(counts[-1] * 11, 10)))
    return counts


@functools.lru_cache(maxsize=256)
def chunk_limits(pair_lengths: tuple[int, ...]) -> tuple[int, ...]:
    """Rows of logits at a time to try: for each number of chunks of whole pairs, the fewest that give no more."""
    longest, rows = max(pair_lengths), sum(pair_lengths)
    limits = set()
    for count in _counts(len(pair_lengths)):
        least, enough = max(longest, ceil_div(rows, count)), rows
        while least < enough:
            middle = (least + enough) // 2
            if len(_greedy(pair_lengths, middle)) <= count:
                enough = middle
            else:
                least = middle + 1
        limits.add(enough)
    return tuple(sorted(limits))


@functools.lru_cache(maxsize=256)
def block_limits(longest: int, multiple: int) -> tuple[int, ...]:
    """Rows of logits at a time to try: for each number of blocks of the longest pair, those that give no more."""
    equal = {ceil_div(longest, count) for count in _counts(longest)[1:]}
    return tuple(sorted({ceil_div(rows, multiple) * multiple if rows >= multiple else rows for rows in equal}))
