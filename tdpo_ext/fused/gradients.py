"""The gradients of a fused loss, accumulated block by block by both plans.

gradients = Gradients(hidden=..., weight=..., bias=...)  # each only where it is wanted
for each block of rows and columns:
    gradients.add(block, hidden, dz)
dhidden, dW, dbias = gradients.finish()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from ..ops import memory
from ..ops.matmul import product
from .inputs import FusedInputs


class Wanted(NamedTuple):
    """Which gradients a call needs."""

    hidden: bool
    weight: bool
    bias: bool


@dataclass(frozen=True)
class Block:
    """Some rows, as a slice of those that count, over some columns of this rank's vocabulary."""

    rows: slice
    columns: slice


def slices(total: int, size: int) -> list[slice]:
    """`total` items, `size` at a time."""
    return [slice(first, min(total, first + size)) for first in range(0, total, max(1, size))]


class HiddenGradient:
    """dhidden, (N, D), of rows that are complete after one block: its columns are the whole vocabulary.

    Ranks that share the vocabulary sum it, in the logits' precision, until `wait`.
    """

    def __init__(self, inputs: FusedInputs, index: Tensor):
        self._inputs, self._index = inputs, index
        self._grad = torch.zeros_like(inputs.policy.hidden)
        self._pending: Callable[[], object] | None = None

    def add(self, block: Block, dz: Tensor) -> None:
        weight, shard, index = self._inputs.policy.weight, self._inputs.hidden_grad_shard, self._index[block.rows]
        if shard is None:
            self._grad.index_copy_(0, index, torch.mm(dz, weight))
            return
        like = torch.empty(0, dtype=self._inputs.logit_dtype, device=weight.device)
        total = shard.sum(lambda out: product(dz, weight, out), (len(index), weight.shape[1]), like)
        self._pending = lambda: self._grad.index_copy_(0, index, total().to(self._grad.dtype))

    def wait(self) -> None:
        """Completes what `add` has started."""
        if self._pending is not None:
            self._pending()
            self._pending = None

    def finish(self) -> Tensor:
        return self._grad


class PartialHiddenGradient:
    """dhidden, (N, D), of rows that are complete only after every slice of the vocabulary.

    Summed in the logits' precision. Ranks that share the vocabulary sum a block's rows once its last slice was added.
    """

    def __init__(self, inputs: FusedInputs, index: Tensor):
        self._inputs, self._index = inputs, index
        shape = (len(index), inputs.policy.width)
        self._sums = torch.zeros(shape, dtype=inputs.logit_dtype, device=inputs.device)
        self._pending: dict[int, Callable[[], Tensor]] = {}  # sums over ranks, by their first row

    def add(self, block: Block, dz: Tensor) -> None:
        product(dz, self._inputs.policy.weight[block.columns], self._sums[block.rows], accumulate=True)
        if self._inputs.hidden_grad_shard is not None and block.columns.stop == self._inputs.vocab:
            self._start_sum(block.rows, lambda out: out.copy_(self._sums[block.rows]))

    def wait(self) -> None:
        """Nothing: the sums over ranks go on until `finish`."""

    def fail(self, blocks: list[slice], failure: Exception) -> NoReturn:
        """Raises `failure` on this rank, and its message on all ranks that wait for sums over these blocks of rows."""

        def raise_failure(_out: Tensor) -> None:
            raise failure

        if self._inputs.hidden_grad_shard is not None:
            for rows in blocks:
                if rows.start not in self._pending:
                    self._start_sum(rows, raise_failure)
            self._finish_sums()
        raise failure

    def finish(self) -> Tensor:
        self._finish_sums()
        grad = torch.zeros_like(self._inputs.policy.hidden)
        return grad.index_copy_(0, self._index, self._sums.to(grad.dtype))

    def _start_sum(self, rows: slice, local: Callable[[Tensor], object]) -> None:
        shard, share = self._inputs.hidden_grad_shard, self._sums[rows]
        assert shard is not None
        self._pending[rows.start] = shard.sum(local, tuple(share.shape), share)

    def _finish_sums(self) -> None:
        for first, total in self._pending.items():
            summed = total()
            self._sums[first : first + len(summed)] = summed


class WeightGradient:
    """dW, (V, D), never summed in low precision. Blocks of the same columns follow each other.

    They are summed in `sums`, in the logits' precision, where it is given, and rounded once; otherwise in dW itself,
    which then has the logits' precision or gets each column from one block.
    """

    def __init__(self, inputs: FusedInputs, sums: Tensor | None):
        weight = inputs.policy.weight
        self._grad = memory.empty(tuple(weight.shape), weight.dtype, weight.device)
        self._sums = sums
        self._columns: slice | None = None  # those being summed

    def add(self, columns: slice, hidden: Tensor, dz: Tensor) -> None:
        """dW[columns] += dz^T hidden."""
        accumulate = columns == self._columns
        if not accumulate:
            self._round()
            self._columns = columns
        target = self._grad[columns] if self._sums is None else self._sums[: columns.stop - columns.start]
        product(dz.t(), hidden, target, accumulate=accumulate)

    def finish(self) -> Tensor:
        if self._columns is None:  # no rows
            return self._grad.zero_()
        self._round()
        return self._grad

    def _round(self) -> None:
        if self._sums is not None and self._columns is not None:
            self._grad[self._columns] = self._sums[: self._columns.stop - self._columns.start]


class BiasGradient:
    """dbias, (V,), summed in the logits' precision."""

    def __init__(self, inputs: FusedInputs):
        self._sums = torch.zeros(inputs.vocab, dtype=inputs.logit_dtype, device=inputs.device)
        self._dtype = inputs.weight_dtype

    def add(self, columns: slice, dz: Tensor) -> None:
        self._sums[columns] += dz.sum(0, dtype=self._sums.dtype)

    def finish(self) -> Tensor:
        return self._sums.to(self._dtype)


@dataclass(frozen=True)
class Gradients:
    """The gradients of a call that are wanted; the others are None."""

    hidden: HiddenGradient | PartialHiddenGradient | None
    weight: WeightGradient | None
    bias: BiasGradient | None

    @property
    def any(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)

    def add(self, block: Block, hidden: Tensor, dz: Tensor, *, defer_weight: bool = False) -> None:
        """A block's share of every gradient, but that of dW if it is deferred; hidden (n, D), dz (n, columns)."""
        if self.hidden is not None:
            self.hidden.add(block, dz)
        if self.bias is not None:
            self.bias.add(block.columns, dz)
        if self.weight is not None and not defer_weight:
            self.weight.add(block.columns, hidden, dz)
        if self.hidden is not None:
            self.hidden.wait()

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dhidden, dW and dbias in the inputs' precision."""
        return (
            None if self.hidden is None else self.hidden.finish(),
            None if self.weight is None else self.weight.finish(),
            None if self.bias is None else self.bias.finish(),
        )
