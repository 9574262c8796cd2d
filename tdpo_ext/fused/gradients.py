"""The gradients of a fused loss, accumulated block by block by both plans.

gradients = Gradients(hidden=..., weight=..., bias=...)  # each only where it is wanted
for each block of rows and columns:
    gradients.add(block, hidden, dz)
dhidden, dW, dbias = gradients.finish()

Where dz lacks a factor that was not known when it was formed, it is given as `Factors`, and multiplied into the rows of
hidden instead, or into sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops import memory
from ..ops.matmul import product
from .inputs import FusedInputs
from .rows import ChunkedRows

_ROUNDED_ROWS = 8192  # rows of a sum rounded at a time


class Wanted(NamedTuple):
    """Which gradients a call needs."""

    hidden: bool
    weight: bool
    bias: bool


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
    """What consecutive rows of dz lack: (rows, factor on the device, or None for 1) of each run of them."""

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


class HiddenGradient:
    """dhidden, (N, D), of rows that are complete after one block: its columns are the whole vocabulary.

    Ranks that share the vocabulary sum it, in the logits' precision, until `wait`.
    """

    def __init__(self, inputs: FusedInputs, rows: ChunkedRows):
        self._inputs, self._rows = inputs, rows
        self._grad = torch.zeros_like(inputs.hidden)
        self._pending: Callable[[], object] | None = None

    def add(self, block: Block, dz: Tensor, factors: Factors = NO_FACTORS) -> None:
        weight = self._inputs.head.weight
        if not (self._inputs.sums_hidden_grad or factors.any):
            view = self._rows.view(self._grad, block.rows)
            if view is None:
                self._put(block, torch.mm(dz, weight))
            else:
                torch.mm(dz, weight, out=view)
            return
        # In the logits' precision, so that it is rounded once.
        share = torch.empty(len(dz), weight.shape[1], dtype=self._inputs.logit_dtype, device=weight.device)

        def multiply(out: Tensor) -> None:
            product(dz, weight, out)
            if factors.any:
                out *= factors.of_rows()

        if not self._inputs.sums_hidden_grad:
            multiply(share)
            self._put(block, share)
            return
        total = self._inputs.exchange.start_sum(multiply, share)
        self._pending = lambda: self._put(block, total())

    def _put(self, block: Block, values: Tensor) -> None:
        self._rows.put(self._grad, block.rows, values.to(self._grad.dtype))

    def wait(self) -> None:
        """Completes what `add` has started."""
        if self._pending is not None:
            self._pending()
            self._pending = None

    def scale(self, rows: slice, factor: Tensor) -> None:
        """Multiplies the gradient of complete rows by a number on the device."""
        scaled = self._rows.take(self._grad, rows) * factor
        self._rows.put(self._grad, rows, scaled.to(self._grad.dtype))

    def finish(self) -> Tensor:
        return self._grad


class PartialHiddenGradient:
    """dhidden, (N, D), of rows that are complete only after every slice of the vocabulary.

    Summed in the logits' precision; ranks that share the vocabulary sum it in the end.
    """

    def __init__(self, inputs: FusedInputs, index: Tensor):
        self._inputs, self._index = inputs, index
        shape = (len(index), inputs.head.width)
        self._sums = torch.zeros(shape, dtype=inputs.logit_dtype, device=inputs.device)

    def add(self, block: Block, dz: Tensor, factors: Factors = NO_FACTORS) -> None:
        assert not factors.any
        product(dz, self._inputs.head.weight[block.columns], self._sums[block.rows], accumulate=True)

    def wait(self) -> None:
        """Nothing: the sum over ranks is taken by `finish`."""

    def finish(self) -> Tensor:
        sums = self._sums
        if self._inputs.sums_hidden_grad:
            sums = self._inputs.exchange.start_sum(lambda _: None, sums)()
        grad = torch.zeros_like(self._inputs.hidden)
        return grad.index_copy_(0, self._index, sums.to(grad.dtype))


class WeightGradient:
    """dW, (V, D), never summed in low precision. Blocks of the same columns follow each other.

    They are summed in `sums`, in the logits' precision, where it is given, and rounded once; otherwise in dW itself,
    which then has the logits' precision or gets each column from one block.
    """

    def __init__(self, inputs: FusedInputs, sums: Tensor | None):
        weight = inputs.head.weight
        self._grad = memory.empty(tuple(weight.shape), weight.dtype, weight.device)
        self._sums = sums
        self._columns: slice | None = None  # those being summed

    def add(self, columns: slice, hidden: Tensor, dz: Tensor) -> None:
        """dW[columns] += dz^T hidden."""
        accumulate = columns == self._columns
        if not accumulate:
            self._round()
            self._columns = columns
        product(dz.t(), hidden, self._target(columns), accumulate=accumulate)

    def _target(self, columns: slice) -> Tensor:
        return self._grad[columns] if self._sums is None else self._sums[: columns.stop - columns.start]

    def finish(self) -> Tensor:
        if self._columns is None:  # no rows
            return self._grad.zero_()
        self._round()
        return self._grad

    def _round(self) -> None:
        if self._sums is not None and self._columns is not None:
            self._grad[self._columns] = self._sums[: self._columns.stop - self._columns.start]


class WholeWeightGradient:
    """dW, (V, D), of blocks whose columns are the whole vocabulary, never summed in low precision.

    Args:
        rest: where a low-precision dW is added to more than once: memory, (`rows_beside`, D) in the logits' precision,
            for the rows of its sum that the memory of dW itself does not hold. Otherwise None: dW gets it directly.
    """

    def __init__(self, inputs: FusedInputs, rest: Tensor | None):
        weight = inputs.head.weight
        self._grad = memory.empty(tuple(weight.shape), weight.dtype, weight.device)
        self._parts = [(slice(0, len(weight)), self._grad)]  # rows, and their sum
        if rest is not None:
            within = len(weight) - len(rest)
            memory_of_grad = self._grad.view(-1).view(torch.uint8)
            held = (
                memory_of_grad[: within * rest.shape[1] * rest.element_size()]
                .view(rest.dtype)
                .view(within, rest.shape[1])
            )
            self._parts = [(slice(0, within), held), (slice(within, len(weight)), rest)]
        self._empty = True

    def add(self, columns: slice, hidden: Tensor, dz: Tensor) -> None:
        """dW += dz^T hidden."""
        for rows, total in self._parts:
            product(dz[:, rows].t(), hidden, total, accumulate=not self._empty)
        self._empty = False

    def scale(self, factor: Tensor) -> None:
        """Multiplies what was added so far by a number on the device."""
        for _, total in self._parts:
            total.mul_(factor)

    def add_scaled(self, summed: Tensor, factor: Tensor) -> None:
        """dW += factor * summed."""
        for rows, total in self._parts:
            if self._empty:
                torch.mul(summed[rows], factor, out=total)
            else:
                total.addcmul_(summed[rows], factor)
        self._empty = False

    def finish(self) -> Tensor:
        if self._empty:  # no rows
            return self._grad.zero_()
        if len(self._parts) > 1:
            (held_rows, held), (rest_rows, rest) = self._parts
            # Rounded rows end where their sums began, or before: in ascending order none is overwritten too early.
            for some in slices(len(held), _ROUNDED_ROWS):
                self._grad[held_rows][some] = held[some].to(self._grad.dtype)
            self._grad[rest_rows].copy_(rest)
        return self._grad


class BiasGradient:
    """dbias, (V,), summed in the logits' precision."""

    def __init__(self, inputs: FusedInputs):
        self._sums = torch.zeros(inputs.vocab, dtype=inputs.logit_dtype, device=inputs.device)
        self._dtype = inputs.weight_dtype

    def add(self, columns: slice, dz: Tensor, factors: Factors = NO_FACTORS) -> None:
        if not factors.any:
            self._sums[columns] += dz.sum(0, dtype=self._sums.dtype)
            return
        for run, (_, factor) in zip(dz.split([rows for rows, _ in factors.runs]), factors.runs):
            total = run.sum(0, dtype=self._sums.dtype)
            self._sums[columns] += total if factor is None else total * factor

    def add_scaled(self, other: BiasGradient, factor: Tensor) -> None:
        """dbias += factor * other."""
        self._sums.addcmul_(other._sums, factor)

    def finish(self) -> Tensor:
        return self._sums.to(self._dtype)


@dataclass(frozen=True)
class Gradients:
    """The gradients of a call that are wanted; the others are None."""

    hidden: HiddenGradient | PartialHiddenGradient | None
    weight: WeightGradient | WholeWeightGradient | None
    bias: BiasGradient | None

    @property
    def any(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, block: Block, hidden: Tensor, dz: Tensor, factors: Factors = NO_FACTORS) -> None:
        """A block's share of every gradient; hidden (n, D), dz (n, columns)."""
        if self.hidden is not None:
            self.hidden.add(block, dz, factors)
        if self.bias is not None:
            self.bias.add(block.columns, dz, factors)
        if self.weight is not None:
            scaled = (hidden * factors.of_rows()).to(hidden.dtype) if factors.any else hidden
            self.weight.add(block.columns, scaled, dz)
        if self.hidden is not None:
            self.hidden.wait()

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden, dW and dbias in the inputs' precision."""
        return (
            None if self.hidden is None else self.hidden.finish(),
            None if self.weight is None else self.weight.finish(),
            None if self.bias is None else self.bias.finish(),
        )


class DeferredGradients:
    """The gradients of one pair, formed block by block up to a factor that is known only at its end.

        pair = DeferredGradients(gradients, inputs, chunk.rows, weight_sum)
        for each block of the pair's rows:  pair.add(block, hidden, dz)
        pair.commit(factor)

    Args:
        gradients: of the call, which the pair's are added to.
        rows: of the pair.
        weight_sum: memory for the pair's dW, (V, D) in the logits' precision; None where it is the call's only pair,
            whose dW is scaled in place.
    """

    def __init__(self, gradients: Gradients, inputs: FusedInputs, rows: slice, weight_sum: Tensor | None):
        self._gradients, self._rows, self._weight_sum = gradients, rows, weight_sum
        self._bias = BiasGradient(inputs) if gradients.bias is not None else None
        self._empty = True

    def add(self, block: Block, hidden: Tensor, dz: Tensor) -> None:
        """A block's unscaled share; its columns are the whole vocabulary."""
        gradients = self._gradients
        if gradients.hidden is not None:
            gradients.hidden.add(block, dz)
        if self._bias is not None:
            self._bias.add(block.columns, dz)
        if self._weight_sum is not None:
            product(dz.t(), hidden, self._weight_sum, accumulate=not self._empty)
        elif gradients.weight is not None:
            gradients.weight.add(block.columns, hidden, dz)
        if gradients.hidden is not None:
            gradients.hidden.wait()
        self._empty = False

    def commit(self, factor: Tensor) -> None:
        """Adds the pair's gradients, times `factor`, to those of the call."""
        gradients = self._gradients
        if self._empty:
            return
        if isinstance(gradients.hidden, HiddenGradient):
            gradients.hidden.scale(self._rows, factor)
        if gradients.bias is not None and self._bias is not None:
            gradients.bias.add_scaled(self._bias, factor)
        if isinstance(gradients.weight, WholeWeightGradient):
            if self._weight_sum is None:
                gradients.weight.scale(factor)
            else:
                gradients.weight.add_scaled(self._weight_sum, factor)
