"""The gradients of a fused loss, accumulated block by block by both plans.

gradients = Gradients(hidden=..., bias=..., weights=[...], ...)  # each only where it is wanted
for each block of rows and columns:
    gradients.add(block, hidden, dz, factors)
dhidden, dbias, *dW = gradients.finish()

Where dz lacks a factor that was not known when it was formed, it is given as `Factors`, and multiplied into the rows of
hidden instead, or into sums.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.matmul import product
from ..ops.memory import Buffer
from .blocks import NO_FACTORS, Block, Factors
from .half import weighted_row_sum
from .heads import Head, columns_of_parts
from .inputs import FusedInputs
from .rows import ChunkedRows
from .stored import StoredGradient, stored
from .weight_gradient import WeightGradient, WeightSum, WholeWeightGradient


class Wanted(NamedTuple):
    """Which gradients a call needs."""

    hidden: bool
    bias: bool
    weights: tuple[bool, ...]  # of each part of the head

    @classmethod
    def of_leaves(cls, needed: Sequence[bool], head: Head) -> Wanted:
        """Of (hidden, bias, *parts of the weight, ...)."""
        return cls(needed[0], needed[1], tuple(needed[2 : 2 + len(head.weights)]))

    @property
    def any(self) -> bool:
        return self.hidden or self.bias or any(self.weights)

    def buffers(self, head: Head, rows: int, dtype: torch.dtype) -> dict[int, Buffer]:
        """A matrix, (rows, D_i), for each part of the weight that wants its gradient, by the part's place."""
        widths = zip(head.widths, self.weights)
        return {part: Buffer((rows, width), dtype) for part, (width, wanted) in enumerate(widths) if wanted}


def zeros_of(hidden: Tensor) -> Tensor:
    """Memory for dhidden, (N, D), in rows, however hidden lies."""
    return torch.zeros_like(hidden, memory_format=torch.contiguous_format)


class HiddenGradient:
    """dhidden, (N, D), of rows that are complete after one block: its columns are the whole vocabulary.

    Ranks that share the vocabulary sum it, in the logits' precision, until `wait`.
    """

    def __init__(self, inputs: FusedInputs, rows: ChunkedRows):
        self._inputs, self._rows = inputs, rows
        self._grad = stored(zeros_of(inputs.hidden))
        self._pending: Callable[[], object] | None = None

    def add(self, block: Block, dz: Tensor, factors: Factors = NO_FACTORS) -> None:
        head, shape = self._inputs.head, (len(dz), self._inputs.head.width)
        if not (self._inputs.sums_hidden_grad or factors.any):
            view = self._rows.view(self._grad.values, block.rows)
            values = dz.new_empty(shape) if view is None else view
            for weight, piece in head.beside(values):
                product(dz, weight, piece)
            if view is None:
                self.put(block.rows, values)
            return
        # In the logits' precision, so that it is rounded once.
        share = torch.empty(shape, dtype=self._inputs.logit_dtype, device=dz.device)

        def multiply(out: Tensor) -> None:
            head.hidden_gradient(dz, block.columns, out)
            if factors.any:
                out *= factors.of_rows()

        if not self._inputs.sums_hidden_grad:
            multiply(share)
            self.put(block.rows, share)
            return
        total = self._inputs.exchange.start_sum(multiply, share)
        self._pending = lambda: self.put(block.rows, total())

    def put(self, rows: slice | Tensor, values: Tensor) -> None:
        """Sets the gradient of some rows, which are complete."""
        for target, piece in self._grad.pieces(values):
            self._rows.put(target, rows, piece)

    def wait(self) -> None:
        """Completes what `add` has started."""
        if self._pending is not None:
            self._pending()
            self._pending = None

    def scale(self, rows: slice, factor: Tensor) -> None:
        """Multiplies the gradient of complete rows by a number on the device."""
        target = self._grad.factor_of_rows
        scaled = self._rows.take(target, rows) * factor
        self._rows.put(target, rows, scaled.to(target.dtype))

    def finish(self) -> StoredGradient:
        return self._grad


class PartialHiddenGradient:
    """dhidden, (N, D), of rows that are complete only after every slice of the vocabulary.

    Summed in the logits' precision; ranks that share the vocabulary sum it in the end.

    Args:
        index: the rows' positions.
        factors: what their dz lacks, in every slice.
    """

    def __init__(self, inputs: FusedInputs, index: Tensor, factors: Factors):
        self._inputs, self._index, self._factors = inputs, index, factors
        shape = (len(index), inputs.head.width)
        self._sums = torch.zeros(shape, dtype=inputs.logit_dtype, device=inputs.device)

    def add(self, block: Block, dz: Tensor, _factors: Factors = NO_FACTORS) -> None:
        """The factors are those of all slices: they wait for `finish`."""
        self._inputs.head.hidden_gradient(dz, block.columns, self._sums[block.rows], accumulate=True)

    def wait(self) -> None:
        """Nothing: the sum over ranks is taken by `finish`."""

    def finish(self) -> StoredGradient:
        sums = self._sums
        if self._factors.any:
            sums *= self._factors.of_rows()
        if self._inputs.sums_hidden_grad:
            sums = self._inputs.exchange.start_sum(lambda _: None, sums)()
        grad = stored(zeros_of(self._inputs.hidden))
        for target, piece in grad.pieces(sums):
            target.index_copy_(0, self._index, piece)
        return grad


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
            if factor is not None and factor.dim():
                self._sums[columns] += weighted_row_sum(run, factor)
                continue
            total = run.sum(0, dtype=self._sums.dtype)
            self._sums[columns] += total if factor is None else total * factor

    def add_scaled(self, other: BiasGradient, factor: Tensor) -> None:
        """dbias += factor * other."""
        self._sums.addcmul_(other._sums, factor)

    def finish(self) -> StoredGradient:
        grad = stored(torch.empty_like(self._sums, dtype=self._dtype))
        for target, piece in grad.pieces(self._sums[:, None]):
            target.copy_(piece)
        return grad


@dataclass(frozen=True)
class Gradients:
    """The gradients of a call that are wanted; the others are None.

    Attributes:
        weights: of each part of the head.
        widths: of these parts.
    """

    hidden: HiddenGradient | PartialHiddenGradient | None
    bias: BiasGradient | None
    weights: Sequence[WeightGradient | WholeWeightGradient | None]
    widths: Sequence[int]

    def add(self, block: Block, hidden: Tensor, dz: Tensor, factors: Factors = NO_FACTORS) -> None:
        """A block's share of every gradient; hidden (n, D), dz (n, columns)."""
        if self.hidden is not None:
            self.hidden.add(block, dz, factors)
        if self.bias is not None:
            self.bias.add(block.columns, dz, factors)
        for weight, piece in zip(self.weights, columns_of_parts(hidden, self.widths)):
            if weight is not None:
                weight.add(block.columns, piece, dz, factors)
        if self.hidden is not None:
            self.hidden.wait()

    def finish(self) -> tuple[StoredGradient | None, ...]:
        """dhidden, dbias, and dW of each part of the head."""
        return tuple(None if each is None else each.finish() for each in (self.hidden, self.bias, *self.weights))


class DeferredGradients:
    """The gradients of one pair, formed block by block up to a factor that is known only at its end.

        pair = DeferredGradients(gradients, inputs, chunk.rows, weight_sums)
        for each block of the pair's rows:  pair.add(block, hidden, dz)
        pair.commit(factor)

    Args:
        gradients: of the call, which the pair's are added to.
        rows: of the pair.
        weight_sums: memory for the pair's dW of each part of the head, (V, D_i) in the logits' precision, by the part's
            place; empty where it is the call's only pair, whose dW is scaled in place.
    """

    def __init__(self, gradients: Gradients, inputs: FusedInputs, rows: slice, weight_sums: Mapping[int, Tensor]):
        self._gradients, self._rows = gradients, rows
        self._apart = {part: WeightSum.whole(total, inputs.weight_dtype) for part, total in weight_sums.items()}
        self._bias = BiasGradient(inputs) if gradients.bias is not None else None
        self._empty = True

    def add(self, block: Block, hidden: Tensor, dz: Tensor, factors: Factors) -> None:
        """A block's share without the pair's factor; its columns are the whole vocabulary."""
        gradients = self._gradients
        if gradients.hidden is not None:
            gradients.hidden.add(block, dz, factors)
        if self._bias is not None:
            self._bias.add(block.columns, dz, factors)
        for part, (weight, piece) in enumerate(zip(gradients.weights, columns_of_parts(hidden, gradients.widths))):
            if part in self._apart:
                self._apart[part].add(piece, dz, factors)
            elif weight is not None:
                weight.add(block.columns, piece, dz, factors)
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
        for part, weight in enumerate(gradients.weights):
            if not isinstance(weight, WholeWeightGradient):
                continue
            if part in self._apart:
                weight.sum.add_scaled(self._apart[part], factor)
            else:
                weight.sum.scale(factor)
