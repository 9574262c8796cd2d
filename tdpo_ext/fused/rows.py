"""Which rows reach the heads, and which sequence each belongs to.

What an objective takes together is a pair: a chosen and a rejected response, its sides. For the losses of sequences
alone (`linear_token_loss`), each sequence is a pair with one side.

On a GPU the host must not wait: it reads a batch's lengths at most once, before the first product, and not at all where
the caller gives them. Everything else about rows is computed where the labels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor

from .. import checks
from ..divergence import segment_sums


@dataclass(frozen=True)
class Segments:
    """Sequences that lie one after the other.

    Attributes:
        lengths: rows of each, on the host.
        lengths_on_device: the same on the device, (sequences,).
        offsets: the first row of each, and the number of all rows, on the device, (sequences + 1,).
    """

    lengths: tuple[int, ...]
    lengths_on_device: Tensor
    offsets: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each sequence, in float64 and in a fixed order: (fields, rows) -> (fields, sequences)."""
        return segment_sums(values.t(), offsets=self.offsets).t()

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Every row's values of per-sequence tensors: (fields, sequences) -> (fields, rows)."""
        return per_sequence.repeat_interleave(self.lengths_on_device, dim=1, output_size=sum(self.lengths))


@dataclass(frozen=True)
class Chunk:
    """Consecutive pairs: their rows, as a slice of `ChunkedRows.index`, and segments, one side after the other."""

    rows: slice
    segments: Segments
    sides: int

    @property
    def pairs(self) -> int:
        return len(self.segments.lengths) // self.sides

    @property
    def count(self) -> int:
        """How many rows these are."""
        return self.rows.stop - self.rows.start

    @property
    def side_rows(self) -> list[slice]:
        """Of each side, its rows among the chunk's."""
        lengths = [sum(self.segments.lengths[some]) for some in self.side_sequences]
        return [slice(stop - length, stop) for length, stop in zip(lengths, accumulate(lengths))]

    @property
    def side_sequences(self) -> list[slice]:
        """Of each side, its sequences among the chunk's."""
        return [slice(side * self.pairs, (side + 1) * self.pairs) for side in range(self.sides)]


@dataclass(frozen=True)
class ChunkedRows:
    """The rows that count, reordered so that every chunk is a slice of them.

    Attributes:
        index: their positions among all rows, (rows,).
        in_place: they are all rows, as they lie: `index` is 0, 1, ..., and none is copied to be read or written.
    """

    index: Tensor
    in_place: bool
    chunks: list[Chunk]

    def take(self, values: Tensor, rows: slice | Tensor = slice(None)) -> Tensor:
        """The values of some of these rows, of a tensor whose first dimension is all rows."""
        return values[rows] if self.in_place else values[self.index[rows]]

    def put(self, target: Tensor, rows: slice | Tensor, values: Tensor) -> None:
        """Sets the values of some of these rows."""
        view = self.view(target, rows)
        if view is None:
            target.index_copy_(0, self.index[rows], values)
        else:
            view.copy_(values)

    def view(self, target: Tensor, rows: slice | Tensor) -> Tensor | None:
        """A view of some of these rows; None where they lie apart."""
        return target[rows] if self.in_place and isinstance(rows, slice) else None


@dataclass(frozen=True)
class Rows:
    """The rows that count of a batch, in order.

    Attributes:
        index: positions of the rows among all (flattened) rows, (rows,).
        segments: one side of all pairs after the other: of 2B sequences, the first B are chosen, the last B rejected.
        sides: of a pair.
        every: all rows count: `index` is 0, 1, ...
    """

    index: Tensor
    segments: Segments
    sides: int
    every: bool = False

    @property
    def lengths(self) -> tuple[int, ...]:
        return self.segments.lengths

    @property
    def lengths_on_device(self) -> Tensor:
        return self.segments.lengths_on_device

    @property
    def pairs(self) -> int:
        return len(self.lengths) // self.sides

    @property
    def pair_lengths(self) -> list[int]:
        """Rows of each pair, all sides together."""
        return [sum(self.lengths[pair :: self.pairs]) for pair in range(self.pairs)]

    def in_chunks(self, chunks_of_pairs: Sequence[range]) -> ChunkedRows:
        """The rows reordered for chunks of consecutive pairs: in each, those of one side after the other."""
        if len(chunks_of_pairs) == 1:
            return ChunkedRows(self.index, self.every, [Chunk(slice(0, len(self.index)), self.segments, self.sides)])
        sequences = torch.arange(len(self.lengths), device=self.index.device)
        first_of_side = range(0, len(self.lengths), self.pairs)
        spans = [
            [slice(first + pairs.start, first + pairs.stop) for first in first_of_side] for pairs in chunks_of_pairs
        ]
        order = torch.cat([sequences[span] for of_chunk in spans for span in of_chunk])
        lengths = self.lengths_on_device[order]
        offsets = _offsets(lengths)
        # From a row's new place to its old one, sequence by sequence.
        moved = self.segments.offsets[order] - offsets[:-1]
        moved = moved.repeat_interleave(lengths, output_size=len(self.index))
        index = self.index[torch.arange(len(self.index), device=self.index.device) + moved]

        sizes = [self.sides * len(pairs) for pairs in chunks_of_pairs]
        chunks, first_row = [], 0
        for of_chunk, on_device, from_first in zip(spans, lengths.split(sizes), _offsets_of_parts(offsets, sizes)):
            on_host = tuple(chain.from_iterable(self.lengths[span] for span in of_chunk))
            rows = slice(first_row, first_row + sum(on_host))
            chunks.append(Chunk(rows, Segments(on_host, on_device, from_first), self.sides))
            first_row = rows.stop
        return ChunkedRows(index, False, chunks)


def _offsets(lengths: Tensor) -> Tensor:
    """0, and the running sums of lengths on the device."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _offsets_of_parts(offsets: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    """The offsets of consecutive parts of some sequences, each from the part's first row."""
    places = torch.arange(len(offsets), device=offsets.device)
    firsts = [0, *accumulate(sizes)]
    own = torch.cat([places[first : first + size + 1] for first, size in zip(firsts, sizes)])
    first = torch.cat([places[first : first + 1].expand(size + 1) for first, size in zip(firsts, sizes)])
    return (offsets[own] - offsets[first]).split([size + 1 for size in sizes])


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can look at a tensor without waiting for the device."""
    return device.type == "cpu"


def counted_rows(counts: Tensor, total: int) -> Tensor:
    """Positions where `counts` (N,) is True, of which there are `total`."""
    return torch.nonzero_static(counts, size=total)[:, 0]


class Sequences:
    """How the labels of a call are laid out in sequences: `rows(labels, ignore_index)` finds the rows that count.

    Attributes:
        sides: of a pair.
    """

    sides: int

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        raise NotImplementedError


class OneSequence(Sequences):
    """No pairs: every label, of any shape, by itself.

    Where the host would have to wait to know which rows are ignored, none is dropped: they contribute 0 all the same.
    """

    sides = 1

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        flat = labels.reshape(-1)
        if reading_is_free(labels.device):
            index = (flat != ignore_index).nonzero()[:, 0]
        else:
            index = torch.arange(len(flat), device=labels.device)
        offsets = torch.arange(2, device=labels.device) * len(index)
        return Rows(index, Segments((len(index),), offsets[1:], offsets), sides=1)


@dataclass(frozen=True)
class Padded(Sequences):
    """Labels (sequences, T), one side of all pairs after the other."""

    sides: int

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        if labels.dim() != 2:
            needed = "(2B, T)" if self.sides == 2 else "(B, T)"
            raise ValueError(f"labels has shape {tuple(labels.shape)}; {needed} is needed, or cu_seqlens with (N,)")
        _check_pairs(len(labels), self.sides)
        counts = labels != ignore_index
        lengths = counts.sum(-1)
        on_host = tuple(lengths.tolist())
        index = counted_rows(counts.reshape(-1), sum(on_host))
        return Rows(index, Segments(on_host, lengths, _offsets(lengths)), self.sides)


@dataclass(frozen=True)
class Packed(Sequences):
    """Labels (N,), sequence s being cu_seqlens[s] to cu_seqlens[s + 1]."""

    cu_seqlens: Tensor
    sides: int

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        cu_seqlens, total = _checked_offsets(self.cu_seqlens, labels), len(labels)
        counts = labels != ignore_index
        running = _offsets(counts.long())
        offsets = cu_seqlens.to(labels.device, torch.int64, non_blocking=True)
        counted = running[offsets.clamp(0, total)]
        given, counted_offsets = torch.stack([offsets, counted]).tolist()  # the one wait
        if not given or given[0] != 0 or given[-1] != total or any(b < a for a, b in pairwise(given)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {total}; got {given}")
        _check_pairs(len(given) - 1, self.sides)
        lengths = tuple(b - a for a, b in pairwise(counted_offsets))
        return Rows(counted_rows(counts, sum(lengths)), Segments(lengths, counted.diff(), counted), self.sides)


@dataclass(frozen=True)
class KnownLengths(Sequences):
    """Labels (N,) of packed sequences whose lengths the host knows; every row counts, and nothing is read back."""

    lengths: Sequence[int]
    cu_seqlens: Tensor | None
    sides: int

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        if isinstance(self.lengths, (str, Tensor)) or not isinstance(self.lengths, Sequence):
            raise TypeError(f"row_lengths is {checks.describe(self.lengths)}; a list of integers is needed")
        lengths = tuple(checks.integer("row_lengths", length, least=0) for length in self.lengths)
        if labels.dim() != 1 or sum(lengths) != len(labels):
            raise ValueError(
                f"row_lengths has the sum {sum(lengths)} but labels has shape {tuple(labels.shape)}; packed rows, "
                "labels (N,), are needed, as many as the lengths together"
            )
        _check_pairs(len(lengths), self.sides)
        if self.cu_seqlens is None:
            offsets = torch.tensor([0, *accumulate(lengths)], device="cpu")
        else:
            offsets = _checked_offsets(self.cu_seqlens, labels)
            if offsets.shape != (len(lengths) + 1,):
                raise ValueError(
                    f"cu_seqlens has shape {tuple(offsets.shape)} but ({len(lengths) + 1},) is needed beside "
                    f"{len(lengths)} row_lengths"
                )
            if reading_is_free(offsets.device) and offsets.tolist() != [0, *accumulate(lengths)]:
                raise ValueError(f"cu_seqlens is {offsets.tolist()}, which row_lengths {lengths} contradicts")
        if offsets.device != labels.device:  # an upload that the host does not wait for
            offsets = offsets.pin_memory().to(labels.device, non_blocking=True)
        index = torch.arange(len(labels), device=labels.device)
        offsets = offsets.to(torch.int64)
        return Rows(index, Segments(lengths, offsets.diff(), offsets), self.sides, every=True)


def _checked_offsets(cu_seqlens: Tensor, labels: Tensor) -> Tensor:
    """Offsets of packed rows, of an integer dtype and one dimension."""
    checks.tensor("cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens has dtype {cu_seqlens.dtype}; allowed are int32 and int64")
    if labels.dim() != 1 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} beside labels of shape {tuple(labels.shape)}; offsets of "
            "shape (2B + 1,) are needed, with rows (N, D) and labels (N,)"
        )
    return cu_seqlens


def _check_pairs(sequences: int, sides: int) -> None:
    if sequences == 0 or sequences % sides:
        needed = "an even, positive number is needed: chosen, then rejected" if sides == 2 else "at least one is needed"
        raise ValueError(f"labels hold {sequences} sequences; {needed}")


def sequences_of(cu_seqlens: Tensor | None, row_lengths: Sequence[int] | None, *, sides: int) -> Sequences:
    """How sequences lie, by which arguments are given."""
    if row_lengths is not None:
        return KnownLengths(row_lengths, cu_seqlens, sides)
    return Padded(sides) if cu_seqlens is None else Packed(cu_seqlens, sides)
