"""dW of a fused loss, summed over blocks of rows and never in low precision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ops import memory, operators
from ..ops.matmul import product
from .blocks import Factors, slices
from .half import WeightUnit, power_of_two
from .stored import ROUNDED_ROWS, StoredGradient, stored


class WeightSum:
    """A sum of products dz^T hidden, (columns, D), in one or more pieces of memory, in their precision.

    Args:
        parts: some of the columns each, and memory for their sum.
        dtype: of dz and hidden. Of float16, the sum, in float32, has a unit (`half`).
    """

    def __init__(self, parts: Sequence[tuple[slice, Tensor]], dtype: torch.dtype):
        self.parts = parts
        self.unit = WeightUnit(parts[0][1].device) if dtype == torch.float16 else None
        self.empty = True

    @classmethod
    def whole(cls, memory: Tensor, dtype: torch.dtype) -> WeightSum:
        """In one piece of memory, (columns, D)."""
        return cls([(slice(0, len(memory)), memory)], dtype)

    def add(self, hidden: Tensor, dz: Tensor, factors: Factors) -> None:
        """sum += dz^T (factors hidden)."""
        if self.unit is not None:
            hidden, shrink = self.unit.weigh(hidden, factors.of_rows())
            self._shrink(shrink)
        elif factors.any:
            hidden = (hidden * factors.of_rows()).to(hidden.dtype)
        for columns, total in self.parts:
            product(dz[:, columns].t(), hidden, total, accumulate=not self.empty)
        self.empty = False

    def scale(self, factor: Tensor) -> None:
        """Multiplies what was added so far by a number on the device."""
        for _, total in self.parts:
            total.mul_(factor)

    def add_scaled(self, other: WeightSum, factor: Tensor) -> None:
        """sum += factor * other, which is in one piece."""
        if self.unit is not None and other.unit is not None:
            factor = factor * other.unit.value
            self._shrink(self.unit.raise_to(power_of_two(factor.abs())))
            factor = factor / self.unit.value
        ((_, summed),) = other.parts
        for columns, total in self.parts:
            if self.empty:
                torch.mul(summed[columns], factor, out=total)
            else:
                total.addcmul_(summed[columns], factor)
        self.empty = False

    def _shrink(self, by: Tensor) -> None:
        if not self.empty:
            for _, total in self.parts:
                operators.scale_unless_one(total, by)


class WeightGradient:
    """dW, (V, D), never summed in low precision. Blocks of the same columns follow each other.

    They are summed in `memory`, in the logits' precision, where it is given, and rounded once; otherwise in dW itself,
    which then has the logits' precision or gets each column from one block.
    """

    def __init__(self, weight: Tensor, sums: Tensor | None):
        self._grad, self._memory = stored(empty_like(weight)), sums
        self._sum: WeightSum | None = None
        self._columns: slice | None = None  # those being summed

    def add(self, columns: slice, hidden: Tensor, dz: Tensor, factors: Factors) -> None:
        """dW[columns] += dz^T (factors hidden)."""
        if self._sum is None or columns != self._columns:
            self._round()
            self._columns = columns
            rows = columns.stop - columns.start
            memory = self._grad.values[columns] if self._memory is None else self._memory[:rows]
            self._sum = WeightSum.whole(memory, hidden.dtype)
        self._sum.add(hidden, dz, factors)

    def finish(self) -> StoredGradient:
        if self._sum is None:  # no rows
            self._grad.values.zero_()
        self._round()
        return self._grad

    def _round(self) -> None:
        if self._sum is not None and self._columns is not None and self._memory is not None:
            round_sum(self._sum, self._grad, self._columns.start)


class WholeWeightGradient:
    """dW, (V, D), of blocks whose columns are the whole vocabulary, never summed in low precision.

    Args:
        rest: where dW is added to in a higher precision than its own: memory, (`rows_beside`, D) in the logits'
            precision, for the rows of its sum that the memory of dW itself does not hold. Otherwise None: dW gets it
            directly.
    """

    def __init__(self, weight: Tensor, rest: Tensor | None):
        self._grad = stored(empty_like(weight))
        values, self._rounds = self._grad.values, rest is not None
        parts = [(slice(0, len(values)), values)]
        if rest is not None:
            within = len(values) - len(rest)
            held = values.view(-1).view(torch.uint8)[: within * rest.shape[1] * rest.element_size()]
            parts = [
                (slice(0, within), held.view(rest.dtype).view(within, rest.shape[1])),
                (slice(within, len(values)), rest),
            ]
        self.sum = WeightSum(parts, weight.dtype)

    def add(self, columns: slice, hidden: Tensor, dz: Tensor, factors: Factors) -> None:
        """dW += dz^T (factors hidden)."""
        self.sum.add(hidden, dz, factors)

    def finish(self) -> StoredGradient:
        if self.sum.empty:  # no rows
            self._grad.values.zero_()
        elif self._rounds:
            round_sum(self.sum, self._grad, 0)
        return self._grad


def empty_like(weight: Tensor) -> Tensor:
    """Memory for dW."""
    return memory.empty(tuple(weight.shape), weight.dtype, weight.device)


def round_sum(summed: WeightSum, grad: StoredGradient, first: int) -> None:
    """Writes a sum into rows of dW from `first`.

    Where it lies in their own memory: rounded rows end where their sums began, or before, so that in ascending order
    none is overwritten too early.
    """
    for columns, total in summed.parts:
        for some in slices(len(total), ROUNDED_ROWS):
            for target, piece in grad.pieces(total[some], summed.unit):
                target[first + columns.start :][some] = piece
