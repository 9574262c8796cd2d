"""Which rows reach the head, and which sequence each belongs to."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The response rows of a batch, in order.

    Attributes:
        index: positions of the rows among all (flattened) rows, (rows,).
        lengths: rows of each of the 2B sequences; the first B are chosen, the last B rejected.
    """

    index: Tensor
    lengths: tuple[int, ...]

    @property
    def pairs(self) -> int:
        return len(self.lengths) // 2

    @cached_property
    def pair_lengths(self) -> list[int]:
        return [self.lengths[pair] + self.lengths[self.pairs + pair] for pair in range(self.pairs)]

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *accumulate(self.lengths)]

    def of_pairs(self, first: int, stop: int) -> Rows:
        """The rows of pairs first to stop, chosen before rejected."""
        spans = [(first, stop), (self.pairs + first, self.pairs + stop)]
        parts = [self.index[self._starts[begin] : self._starts[end]] for begin, end in spans]
        lengths = self.lengths[first:stop] + self.lengths[self.pairs + first : self.pairs + stop]
        return Rows(torch.cat(parts), lengths)

    @cached_property
    def _lengths_on_device(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.index.device)

    def sequence_sums(self, values: Tensor) -> Tensor:
        """Sums per sequence, in a fixed order: (rows,) -> (2B,). Differentiable."""
        return torch.segment_reduce(values, "sum", lengths=self._lengths_on_device, initial=0)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Every row's share of a per-sequence tensor: (2B,) -> (rows,)."""
        return per_sequence.repeat_interleave(self._lengths_on_device, output_size=len(self.index))


def padded_rows(labels: Tensor, ignore_index: int, sequences: int) -> Rows:
    """Rows of `sequences` equally long sequences, labels (sequences * T,), leaving out the ignored."""
    kept = labels != ignore_index
    lengths = kept.view(sequences, -1).sum(-1) if sequences else kept.new_zeros(0, dtype=torch.int64)
    return Rows(kept.nonzero()[:, 0], tuple(lengths.tolist()))


def packed_rows(labels: Tensor, ignore_index: int, cu_seqlens: Tensor) -> Rows:
    """Rows of packed sequences, labels (N,), sequence s being cu_seqlens[s] to cu_seqlens[s + 1].

    Raises:
        ValueError: cu_seqlens doesn't rise from 0 to N.
    """
    if labels.dim() != 1 or cu_seqlens.dim() != 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens has shape {tuple(cu_seqlens.shape)} and dtype {cu_seqlens.dtype}; integer offsets (2B + 1,) "
            "are needed, with rows (N, D) and labels (N,)"
        )
    offsets = cu_seqlens.tolist()
    if not offsets or offsets[0] != 0 or offsets[-1] != len(labels) or any(b < a for a, b in pairwise(offsets)):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of rows, {len(labels)}; got {offsets}")
    kept = labels != ignore_index
    running = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])
    lengths = running[cu_seqlens.to(running.device, torch.int64)].diff()
    return Rows(kept.nonzero()[:, 0], tuple(lengths.tolist()))
