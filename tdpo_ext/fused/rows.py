"""Which rows reach the heads, and which sequence each belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """Sequences that lie one after the other: rows of each, and where they are summed."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def _on_device(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.device)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each sequence, in a fixed order: (fields, rows) -> (fields, sequences). Differentiable."""
        return torch.segment_reduce(values.t(), "sum", lengths=self._on_device, initial=0).t()

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Every row's value of a per-sequence tensor: (sequences,) -> (rows,)."""
        return per_sequence.repeat_interleave(self._on_device, output_size=sum(self.lengths))


@dataclass(frozen=True)
class Rows:
    """The rows that count of a batch, in order.

    Attributes:
        index: positions of the rows among all (flattened) rows, (rows,).
        lengths: rows of each sequence; of 2B sequences, the first B are chosen, the last B rejected.
    """

    index: Tensor
    lengths: tuple[int, ...]

    @property
    def pairs(self) -> int:
        return len(self.lengths) // 2

    @property
    def pair_lengths(self) -> list[int]:
        """Rows of each pair, both responses together."""
        return [chosen + rejected for chosen, rejected in zip(self.lengths[: self.pairs], self.lengths[self.pairs :])]

    @property
    def segments(self) -> Segments:
        return Segments(self.lengths, self.index.device)

    def in_chunks(self, pairs: Sequence[tuple[int, int]]) -> tuple[Tensor, list[Chunk]]:
        """The index reordered so that every chunk (first pair, stop) is a slice of it; and the chunks."""
        starts = [0, *accumulate(self.lengths)]
        parts, chunks, done = [], [], 0
        for first, stop in pairs:
            sides = [(first, stop), (self.pairs + first, self.pairs + stop)]  # of sequences: chosen, rejected
            parts += [self.index[starts[begin] : starts[end]] for begin, end in sides]
            lengths = tuple(length for begin, end in sides for length in self.lengths[begin:end])
            chunks.append(Chunk(slice(done, done + sum(lengths)), Segments(lengths, self.index.device)))
            done += sum(lengths)
        return torch.cat(parts), chunks


@dataclass(frozen=True)
class Chunk:
    """Rows of consecutive pairs, a slice of the reordered index; its segments are chosen before rejected."""

    rows: slice
    segments: Segments


class Sequences:
    """How the labels of a call are laid out in sequences: `rows(labels, ignore_index)` finds the rows that count."""

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        raise NotImplementedError


class OneSequence(Sequences):
    """No pairs: every label, of any shape, by itself."""

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        index = (labels.reshape(-1) != ignore_index).nonzero()[:, 0]
        return Rows(index, (len(index),))


class PaddedPairs(Sequences):
    """Labels (2B, T): chosen, then rejected."""

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        if labels.dim() != 2:
            raise ValueError(f"labels has shape {tuple(labels.shape)}; (2B, T) is needed, or cu_seqlens with (N,)")
        counts = labels != ignore_index
        lengths = tuple(counts.sum(-1).tolist())
        _check_pairs(len(lengths))
        return Rows(counts.reshape(-1).nonzero()[:, 0], lengths)


@dataclass(frozen=True)
class PackedPairs(Sequences):
    """Labels (N,), sequence s of 2B being cu_seqlens[s] to cu_seqlens[s + 1]."""

    cu_seqlens: Tensor

    def rows(self, labels: Tensor, ignore_index: int) -> Rows:
        cu_seqlens = self.cu_seqlens
        if labels.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
            raise ValueError(
                f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; integer offsets of "
                "shape (2B + 1,) are needed, with rows (N, D) and labels (N,)"
            )
        offsets = cu_seqlens.tolist()
        if not offsets or offsets[0] != 0 or offsets[-1] != len(labels) or any(b < a for a, b in pairwise(offsets)):
            raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {len(labels)}; got {offsets}")
        _check_pairs(len(offsets) - 1)
        counts = labels != ignore_index
        running = torch.cat([counts.new_zeros(1, dtype=torch.int64), counts.cumsum(0)])
        lengths = running[cu_seqlens.to(running.device, torch.int64)].diff()
        return Rows(counts.nonzero()[:, 0], tuple(lengths.tolist()))


def _check_pairs(sequences: int) -> None:
    if sequences == 0 or sequences % 2:
        raise ValueError(
            f"labels hold {sequences} sequences; an even, positive number is needed: chosen, then rejected"
        )
