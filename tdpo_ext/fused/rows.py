"""Which rows reach the heads, and which sequence each belongs to.

On a GPU the host must not wait: it reads a batch's lengths at most once, before the first product, and not at all where
the caller gives them. Everything else about rows is computed where the labels are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .. import checks
from ..divergence import segment_sums


@dataclass(frozen=True)
class Segments:
    """Sequences that lie one after the other: their rows, on the host and on the device, (sequences,)."""

    lengths: tuple[int, ...]
    lengths_on_device: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each sequence, in float64 and in a fixed order: (fields, rows) -> (fields, sequences)."""
        return segment_sums(values.t(), self.lengths_on_device).t()

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Every row's values of per-sequence tensors: (fields, sequences) -> (fields, rows)."""
        return per_sequence.repeat_interleave(self.lengths_on_device, dim=1, output_size=sum(self.lengths))


@dataclass(frozen=True)
class Chunk:
    """Consecutive pairs: their rows, as a slice of `ChunkedRows.index`, and segments, chosen before rejected."""

    rows: slice
    segments: Segments

    @property
    def pairs(self) -> int:
        return len(self.segments.lengths) // 2

    @property
    def count(self) -> int:
        """How many rows these are."""
        return self.rows.stop - self.rows.start

    @property
    def chosen_rows(self) -> int:
        """Rows of the chosen sequences, which come first."""
        return sum(self.segments.lengths[: self.pairs])


@dataclass(frozen=True)
class ChunkedRows:
    """The rows that count, reordered so that every chunk is a slice of `index`."""

    index: Tensor
    chunks: list[Chunk]


@dataclass(frozen=True)
class Rows:
    """The rows that count of a batch, in order.

    Attributes:
        index: positions of the rows among all (flattened) rows, (rows,).
        lengths: rows of each sequence, on the host; of 2B sequences, the first B are chosen, the last B rejected.
        lengths_on_device: the same where the labels are, (sequences,).
    """

    index: Tensor
    lengths: tuple[int, ...]
    lengths_on_device: Tensor

    @property
    def pairs(self) -> int:
        return len(self.lengths) // 2

    @property
    def pair_lengths(self) -> list[int]:
        """Rows of each pair, both responses together."""
        return [chosen + rejected for chosen, rejected in zip(self.lengths[: self.pairs], self.lengths[self.pairs :])]

    def in_chunks(self, chunks_of_pairs: Sequence[range]) -> ChunkedRows:
        """The rows reordered for chunks of consecutive pairs: in each, those of its chosen, then of its rejected."""
        sequences = torch.arange(len(self.lengths), device=self.index.device)
        spans = [(pairs.start + side, pairs.stop + side) for pairs in chunks_of_pairs for side in (0, self.pairs)]
        order = torch.cat([sequences[begin:end] for begin, end in spans])
        lengths = self.lengths_on_device[order]
        # From a row's new place to its old one, sequence by sequence.
        moved = self.lengths_on_device.cumsum(0)[order] - lengths.cumsum(0)
        moved = moved.repeat_interleave(lengths, output_size=len(self.index))
        index = self.index[torch.arange(len(self.index), device=self.index.device) + moved]

        chunks, first_row, first_sequence = [], 0, 0
        for chosen, rejected in zip(spans[::2], spans[1::2]):
            on_host = self.lengths[slice(*chosen)] + self.lengths[slice(*rejected)]
            rows = slice(first_row, first_row + sum(on_host))
            on_device = lengths[first_sequence : first_sequence + len(on_host)]
            chunks.append(Chunk(rows, Segments(on_host, on_device)))
            first_row, first_sequence = rows.stop, first_sequence + len(on_host)
        return ChunkedRows(index, chunks)


def reading_is_free(device: torch.device) -> bool:
    """Whether the host can look at a tensor without waiting for the device."""
    return device.type == "cpu"


def counted_rows(counts: Tensor, total: int) -> Tensor:
    """Positions where `counts` (N,) is True, of which there are `total`."""
    return torch.nonzero_static(counts, size=total)[:, 0]


class Sequences:
    """How the labels of a call are laid out in sequences: `rows(labels, ignore_index)` finds the rows that count."""

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        raise NotImplementedError


class OneSequence(Sequences):
    """No pairs: every label, of any shape, by itself.

    Where the host would have to wait to know which rows are ignored, none is dropped: they contribute 0 all the same.
    """

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        flat = labels.reshape(-1)
        if reading_is_free(labels.device):
            index = (flat != ignore_index).nonzero()[:, 0]
        else:
            index = torch.arange(len(flat), device=labels.device)
        return Rows(index, (len(index),), torch.full((1,), len(index), device=labels.device))


class PaddedPairs(Sequences):
    """Labels (2B, T): chosen, then rejected."""

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        if labels.dim() != 2:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; (2B, T) is needed, or cu_seqlens with (N,)")
        _check_pairs(len(labels))
        counts = labels != ignore_index
        lengths = counts.sum(-1)
        on_host = tuple(lengths.tolist())
        return Rows(counted_rows(counts.reshape(-1), sum(on_host)), on_host, lengths)


@dataclass(frozen=True)
class PackedPairs(Sequences):
    """Labels (N,), sequence s of 2B being cu_seqlens[s] to cu_seqlens[s + 1]."""

    cu_seqlens: Tensor

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        cu_seqlens, total = _checked_offsets(self.cu_seqlens, labels), len(labels)
        counts = labels != ignore_index
        running = torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)])
        offsets = cu_seqlens.to(labels.device, torch.int64, non_blocking=True)
        counted = running[offsets.clamp(0, total)]
        given, counted_offsets = torch.stack([offsets, counted]).tolist()  # the one wait
        if not given or given[0] != 0 or given[-1] != total or any(b < a for a, b in pairwise(given)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {total}; got {given}")
        _check_pairs(len(given) - 1)
        lengths = tuple(b - a for a, b in pairwise(counted_offsets))
        return Rows(counted_rows(counts, sum(lengths)), lengths, counted.diff())


@dataclass(frozen=True)
class KnownPairs(Sequences):
    """Labels (N,) of packed sequences whose lengths the host knows; every row counts, and nothing is read back."""

    lengths: Sequence[int]
    cu_seqlens: Tensor | None

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        if isinstance(self.lengths, (str, Tensor)) or not isinstance(self.lengths, Sequence):
            raise TypeError(f"row_lengths is {checks.describe(self.lengths)}; a list of integers is needed")
        lengths = tuple(checks.integer("row_lengths", length, least=0) for length in self.lengths)
        if labels.dim() != 1 or sum(lengths) != len(labels):
            raise ValueError(
                f"row_lengths has the sum {sum(lengths)} but labels has shape {tuple(labels.shape)}; packed rows, "
                "labels (N,), are needed, as many as the lengths together"
            )
        _check_pairs(len(lengths))
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
        return Rows(index, lengths, offsets.to(torch.int64).diff())


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


def _check_pairs(sequences: int) -> None:
    if sequences == 0 or sequences % 2:
        raise ValueError(
            f"labels hold {sequences} sequences; an even, positive number is needed: chosen, then rejected"
        )
