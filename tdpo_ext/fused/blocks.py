"""Blocks of rows and columns of dz, and what their rows lack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Some rows, as a slice of those that count or their positions, over some columns of this rank's vocabulary."""

    rows: slice | Tensor
    columns: slice


def slices(total: int, size: int) -> list[slice]:
    """`total` items, `size` at a time."""
    return [slice(first, min(total, first + size)) for first in range(0, total, max(1, size))]


@dataclass(frozen=True)
class Factors:
    """What consecutive rows of dz lack: the rows of each run of them and, on the device, a factor () that they share or
    one for each, (rows, 1); None for 1."""

    runs: Sequence[tuple[int, Tensor | None]]

    @property
    def any(self) -> bool:
        return any(factor is not None for _, factor in self.runs)

    def of_rows(self) -> Tensor:
        """Every row's factor, (rows, 1)."""
        dtype, device = next((factor.dtype, factor.device) for _, factor in self.runs if factor is not None)
        one = torch.ones((), dtype=dtype, device=device)
        return torch.cat([(one if factor is None else factor).expand(rows, 1) for rows, factor in self.runs])


NO_FACTORS = Factors(())
