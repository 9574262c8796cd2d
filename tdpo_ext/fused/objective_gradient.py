"""From the values of some pairs' rows to their loss, and to its gradients with respect to every row.

The objective is ordinary differentiable torch code on a handful of numbers; its autograd gives dL/dlogps and dL/dkl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..divergence import TokenDivergence, TokenRows
from ..losses import MarginLoss, Objective, sees_tokens
from ..objective_checks import check_linear, refuse_parameters
from .rows import Chunk


@dataclass(frozen=True)
class Upstream:
    """The loss of some pairs, and its gradients.

    Attributes:
        loss: their share of the mean loss over all pairs.
        sums: of each sequence, (fields, sides * pairs), one side after the other.
        logps_grad, kl_grad: dL/dlogps and dL/dkl of each row, (rows,); 0 where nothing is differentiated.
        columns_grad: dL/dcolumn of each row, of the columns that require it.
        kl_of_sides: of each side, whether its KL has a gradient at all (that of TDPO2's chosen side has none).
    """

    loss: Tensor
    sums: Tensor
    logps_grad: Tensor
    kl_grad: Tensor
    columns_grad: dict[str, Tensor]
    kl_of_sides: tuple[bool, ...]


@dataclass(frozen=True)
class Coefficients:
    """dmargin/dlogps and dmargin/dkl of each row, (rows,)."""

    logps_grad: Tensor
    kl_grad: Tensor

    def of_rows(self, rows: slice) -> Coefficients:
        return Coefficients(self.logps_grad[rows], self.kl_grad[rows])

    def stacked(self) -> Tensor:
        """Both, (2, rows)."""
        return torch.stack([self.logps_grad, self.kl_grad])


@dataclass(frozen=True)
class PairObjective:
    """An objective and the share that each of its pairs' losses has in the mean.

    Attributes:
        total_pairs: of the whole call.
        differentiable: whether gradients are wanted.
        column_grads: names of the columns that want a gradient.
        grad_enabled: the caller's grad mode: parameters of the objective would then want a gradient.
    """

    function: Objective
    total_pairs: int
    differentiable: bool
    column_grads: frozenset[str]
    grad_enabled: bool

    def upstream(self, values: Tensor, chunk: Chunk, columns: Mapping[str, Tensor]) -> Upstream:
        """Loss and gradients of a chunk from its rows' values, (fields, rows), one side after the other."""
        with torch.set_grad_enabled(self.grad_enabled):
            sides = _sides(self.function, values, chunk, self._column_leaves(columns), self.differentiable)
            loss = self._mean_share(self.function(*sides.values), chunk)
        refuse_parameters(self.function, loss, sides.leaves)
        if not (self.differentiable and loss.requires_grad):
            return _without_gradients(loss.detach(), sides.sums, values, chunk)
        return sides.upstream(loss)

    def coefficients(self, values: Tensor, chunk: Chunk, columns: Mapping[str, Tensor]) -> Coefficients:
        """The gradient of a MarginLoss's margin by every row of a chunk: it does not depend on `values`."""
        assert isinstance(self.function, MarginLoss)
        with torch.enable_grad():
            sides = _sides(self.function, values, chunk, columns, True)
            return sides.coefficients(self.function.margin(*sides.values))

    def link_upstream(
        self, values: Tensor, pair: Chunk, columns: Mapping[str, Tensor], used: Coefficients
    ) -> tuple[Upstream, Tensor]:
        """Of one pair: loss, sums and gradients of columns, and the loss's derivative by the pair's margin, a scalar.

        Raises:
            ValueError: the margin's coefficients at these values are not those that were `used`.
        """
        assert isinstance(self.function, MarginLoss)
        with torch.set_grad_enabled(self.grad_enabled):
            sides = _sides(self.function, values, pair, self._column_leaves(columns), self.differentiable)
            margin = self.function.margin(*sides.values)
            loss = self._mean_share(self.function.link(margin), pair)
        refuse_parameters(self.function, loss, sides.leaves)
        upstream = _without_gradients(loss.detach(), sides.sums, values, pair)
        if not (self.differentiable and loss.requires_grad):
            return upstream, loss.new_zeros(())
        check_linear(self.function, used.stacked(), sides.coefficients(margin).stacked())
        leaves = sides.column_leaves
        slope, *column_grads = torch.autograd.grad(
            loss, (margin, *leaves.values()), allow_unused=True, materialize_grads=True
        )
        return replace(upstream, columns_grad=dict(zip(leaves, column_grads))), slope.reshape(())

    def nothing(self, values: Tensor, chunk: Chunk) -> Upstream:
        """What stands for a chunk's loss where it could not be computed."""
        loss = values.new_zeros((), dtype=torch.float64)
        return _without_gradients(loss, chunk.segments.sum(values), values, chunk)

    def _column_leaves(self, columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: column.detach().requires_grad_(self.differentiable and name in self.column_grads)
            for name, column in columns.items()
        }

    def _mean_share(self, losses: Tensor, chunk: Chunk) -> Tensor:
        if losses.shape != (chunk.pairs,):
            what = "pairs" if chunk.sides == 2 else "sequences"
            raise ValueError(f"objective returned {tuple(losses.shape)} for {chunk.pairs} {what}")
        return losses.sum() / self.total_pairs


def _without_gradients(loss: Tensor, sums: Tensor, values: Tensor, chunk: Chunk) -> Upstream:
    zeros = values.new_zeros(values.shape[1])
    without_kl = (False,) * chunk.sides
    return Upstream(loss, sums, logps_grad=zeros, kl_grad=zeros, columns_grad={}, kl_of_sides=without_kl)


@dataclass(frozen=True)
class _Sides:
    """The sides of some pairs as the objective sees them, with the leaves that gradients are taken of.

    The objective gets copies: what it writes in place changes no metric and no other chunk.
    """

    chunk: Chunk
    values: tuple[TokenDivergence | TokenRows, ...]
    column_leaves: dict[str, Tensor]
    row_dtype: torch.dtype
    sums: Tensor

    def upstream(self, loss: Tensor) -> Upstream:
        """The gradients of `loss`, for every row."""
        grads = _gradients(loss, self._value_leaves() | self.column_leaves)
        of_rows = self._of_rows(grads)
        return Upstream(
            loss=loss.detach(),
            sums=self.sums,
            logps_grad=of_rows.logps_grad,
            kl_grad=of_rows.kl_grad,
            columns_grad={name: _or_zeros(grads[name], leaf) for name, leaf in self.column_leaves.items()},
            kl_of_sides=tuple(grads[name] is not None for name in self._kl_leaves()),
        )

    def coefficients(self, margin: Tensor) -> Coefficients:
        """The gradients of a pair's margin, whose graph stays, for every row."""
        return self._of_rows(_gradients(margin, self._value_leaves(), retain_graph=True))

    @property
    def leaves(self) -> list[Tensor]:
        """All that gradients are taken of."""
        return [*self._value_leaves().values(), *self.column_leaves.values()]

    def _value_leaves(self) -> dict[str, Tensor]:
        """In the order of `_of_rows`: logps before kl, of each one side after the other."""
        logps = {f"side {number}: logps": side.logps for number, side in enumerate(self.values)}
        return logps | self._kl_leaves()

    def _kl_leaves(self) -> dict[str, Tensor]:
        return {f"side {number}: kl": side.kl for number, side in enumerate(self.values)}

    def _of_rows(self, grads: Mapping[str, Tensor | None]) -> Coefficients:
        """The gradients of all sides' values, for every row."""
        both = torch.cat([_or_zeros(grads[name], leaf) for name, leaf in self._value_leaves().items()]).view(2, -1)
        if isinstance(self.values[0], TokenDivergence):
            both = self.chunk.segments.spread(both)
        logps_grad, kl_grad = both.to(self.row_dtype).unbind(0)
        return Coefficients(logps_grad, kl_grad)


def _gradients(output: Tensor, leaves: Mapping[str, Tensor], *, retain_graph: bool = False) -> dict[str, Tensor | None]:
    """The gradients of a sum by name; None where it does not depend on a leaf."""
    if not output.requires_grad:
        return dict.fromkeys(leaves)
    with torch.enable_grad():
        total = output.sum()
    grads = torch.autograd.grad(total, tuple(leaves.values()), allow_unused=True, retain_graph=retain_graph)
    return dict(zip(leaves, grads))


def _or_zeros(grad: Tensor | None, leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if grad is None else grad


def _sides(
    objective: Objective, values: Tensor, chunk: Chunk, columns: Mapping[str, Tensor], differentiable: bool
) -> _Sides:
    leaves = {name: column for name, column in columns.items() if column.requires_grad}
    if not sees_tokens(objective):
        sums = chunk.segments.sum(values)
        of_sums = tuple(
            side._replace(
                logps=side.logps.detach().requires_grad_(differentiable),
                kl=side.kl.detach().requires_grad_(differentiable),
            )
            for side in TokenDivergence.unstack(sums.clone()).chunk(chunk.sides)
        )
        return _Sides(chunk, of_sums, leaves, values.dtype, sums)

    def side_rows(rows: slice, rows_of_pair: Tensor) -> TokenRows:
        logps, ref_logps, kl, entropy, correct, tokens = values.detach()[:, rows].clone().unbind(0)
        return TokenRows(
            logps=logps.detach().requires_grad_(differentiable),
            ref_logps=ref_logps,
            kl=kl.detach().requires_grad_(differentiable),
            entropy=entropy,
            correct=correct,
            tokens=tokens,
            columns={name: column[rows].clone() for name, column in columns.items()},
            rows_of_pair=rows_of_pair.clone(),
        )

    lengths = chunk.segments.lengths_on_device
    return _Sides(
        chunk,
        values=tuple(side_rows(rows, lengths[some]) for rows, some in zip(chunk.side_rows, chunk.side_sequences)),
        column_leaves=leaves,
        row_dtype=values.dtype,
        sums=chunk.segments.sum(values),
    )
