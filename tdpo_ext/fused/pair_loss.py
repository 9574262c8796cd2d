"""A loss of pairs, or of sequences alone, whose gradients are formed in the forward pass; backward hands them over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..derivatives import anchor, once
from ..divergence import TokenDivergence
from ..losses import Objective
from ..ops import operators
from .gradients import Wanted
from .inputs import FusedInputs
from .objective_gradient import PairObjective
from .rows import Rows
from .stored import StoredGradient, stored


@dataclass(frozen=True)
class Outcome:
    """What a plan computes: the mean loss, sums of each side (fields, pairs), and the gradients that were wanted.

    Attributes:
        gradients: dhidden, dbias, and dW of each part of the head, as they are stored.
        column_gradients: of the columns that want one, each (N,).
    """

    loss: Tensor
    sides: tuple[Tensor, ...]
    gradients: tuple[StoredGradient | None, ...]
    column_gradients: dict[str, StoredGradient] = field(default_factory=dict)


@dataclass(frozen=True)
class PairLoss:
    """A loss over the rows of a batch, of pairs or of sequences alone.

    Attributes:
        function: the public function that was called.
        columns: the call's token columns, flat, each (N,).
        grad_enabled: the caller's grad mode.
    """

    function: str
    objective: Objective
    inputs: FusedInputs
    rows: Rows
    columns: Mapping[str, Tensor]
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)

    def pair_objective(self, wanted: Wanted, wanted_columns: frozenset[str]) -> PairObjective:
        """The objective with each pair's share in the mean, differentiable where anything is wanted."""
        return PairObjective(
            self.objective,
            self.rows.pairs,
            differentiable=wanted.any or bool(wanted_columns),
            column_grads=wanted_columns,
            grad_enabled=self.grad_enabled,
        )

    def apply(self, run: Callable[[Wanted, frozenset[str]], Outcome]) -> tuple[Tensor, list[TokenDivergence]]:
        """(mean loss over pairs, and sums of the sequences of each side, each (pairs,), without a graph)."""
        inputs = self.inputs
        head = inputs.head
        leaves = (inputs.hidden, head.bias, *head.weights, *self.columns.values())
        differentiable = self.grad_enabled and any(leaf is not None and leaf.requires_grad for leaf in leaves)

        def outcome(needs_grad: tuple[bool, ...]) -> Outcome:
            needed = [differentiable and need for need in needs_grad]
            wanted = Wanted.of_leaves(needed, head)
            of_columns = needed[2 + len(head.weights) :]
            columns = (name for name, need in zip(self.columns, of_columns) if need)
            result = run(wanted, frozenset(columns))
            inputs.exchange.finish(inputs.device)
            return result

        origin = _Origin(anchor(leaves)) if differentiable else None
        call = _Call(self.function, tuple(self.columns), outcome, origin)
        loss, *sides = _HandedOver.apply(call, *leaves)
        return loss, [TokenDivergence.unstack(side) for side in sides]


@dataclass(frozen=True)
class _Origin:
    """The `anchor` of a loss's leaves, beside its graph: only a second derivative would go there."""

    leaves: Tensor


@dataclass(frozen=True)
class _Call:
    """What `_HandedOver` takes beside the leaves.

    Attributes:
        function: the public function.
        columns: names of the token columns, the last of the leaves.
        run: gets for each leaf whether its gradient is needed.
    """

    function: str
    columns: tuple[str, ...]
    run: Callable[[tuple[bool, ...]], Outcome]
    origin: _Origin | None


class _HandedOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call: _Call, hidden: Tensor, *others: Tensor | None):
        with torch.autocast(hidden.device.type, enabled=False):
            outcome = call.run(ctx.needs_input_grad[1:])
        ctx.function, ctx.origin = call.function, call.origin
        ctx.gradients = (*outcome.gradients, *(outcome.column_gradients.get(name) for name in call.columns))
        # Sums are taken in float64; users get them in the precision of the values.
        loss, *sides = (value.to(operators.state_dtype(hidden.dtype)) for value in (outcome.loss, *outcome.sides))
        ctx.mark_non_differentiable(*sides)
        ctx.set_materialize_grads(False)  # of the sums
        return loss, *sides

    @staticmethod
    def backward(ctx, loss_grad: Tensor, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                f"tdpo_ext: the gradients of this {ctx.function} were handed over by an earlier backward; compute "
                "the loss again (retain_graph can't keep them)"
            )
        factor = loss_grad.detach()
        gradients = [None if gradient is None else gradient.rounded(factor) for gradient in ctx.gradients]
        ctx.gradients = None
        return (None, *once(ctx.function, gradients, (ctx.origin.leaves, loss_grad)))


def column_gradient(column: Tensor, index: Tensor, exact: Tensor) -> StoredGradient:
    """The gradient of a whole column, (N,), from that of the rows at `index`."""
    grad = stored(torch.zeros_like(column, memory_format=torch.contiguous_format))
    for target, piece in grad.pieces(exact[:, None]):
        target.index_copy_(0, index, piece)
    return grad
