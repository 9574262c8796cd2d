"""Tries an objective on made-up pairs: a loss each, every pair treated alone, and margins that are linear.

Objectives see one of two things for each side of some pairs: per-sequence sums (TokenDivergence), or, decorated with
`per_token`, all tokens (TokenRows).
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from types import MethodType

import torch
from torch import Tensor

from . import checks
from .divergence import TokenDivergence, TokenRows, segment_sums
from .losses import MarginLoss, Objective, sees_tokens
from .vocab_parallel import digest

_PAIRS = 3


@dataclass(frozen=True)
class _Accepted:
    """An objective that has passed, while it lives, and a digest of its losses."""

    reference: weakref.ref
    digest: int


_accepted: dict[object, _Accepted] = {}


def check_objective(objective: Objective, device: torch.device, columns: Mapping[str, Tensor]) -> int:
    """Tries an objective, once, on made-up pairs: a loss each, the same whether it sees a pair alone or among others.

    On the CPU, so that nothing waits for a GPU; where an objective holds tensors of its own on a GPU, there. Returns a
    digest of the losses, which tells objectives apart.

    Raises:
        ValueError: it returns something else, or couples pairs; or a MarginLoss has a margin that is not linear.
    """
    key = _identity(objective)
    if key is not None and key in _accepted and _accepted[key].reference() is not None:
        return _accepted[key].digest
    try:
        losses = _check_on(objective, torch.device("cpu"), columns)
    except (RuntimeError, TypeError):
        if device.type == "cpu":
            raise
        losses = _check_on(objective, device, columns)
    found = digest(losses) ^ isinstance(objective, MarginLoss)
    if key is not None:
        _accepted[key] = _Accepted(_reference(objective), found)
    return found


def _identity(objective: Objective) -> object | None:
    """What tells an objective from others for as long as it lives; None where it can't be told."""
    if isinstance(objective, MethodType):  # a bound method is a new object at every access
        return (id(objective.__self__), objective.__func__)
    try:
        weakref.ref(objective)
    except TypeError:
        return None
    return id(objective)


def _reference(objective: Objective) -> weakref.ref:
    return weakref.WeakMethod(objective) if isinstance(objective, MethodType) else weakref.ref(objective)


def _check_on(objective: Objective, device: torch.device, columns: Mapping[str, Tensor]) -> Tensor:
    """The losses of the made-up pairs."""
    with torch.enable_grad():
        chosen, rejected = (_made_up_side(objective, side, device, columns) for side in (0, 1))
        losses = objective(chosen, rejected)
        if not isinstance(losses, Tensor) or losses.shape != (_PAIRS,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"objective returned {got} for {_PAIRS} pairs; a loss per pair is needed, ({_PAIRS},)")
        if not losses.isfinite().all():
            raise ValueError(f"objective returned {losses.tolist()} for ordinary made-up pairs")
        for pair in range(_PAIRS):
            alone = objective(_only_pair(chosen, pair), _only_pair(rejected, pair))
            if alone.shape != (1,) or not torch.allclose(alone[0], losses[pair], rtol=1e-4, atol=1e-6):
                raise ValueError("objective couples pairs: the loss of one pair depends on other pairs' values")
            _check_gradients(losses[pair], pair, (chosen, rejected))
    if isinstance(objective, MarginLoss):
        _check_made_up_margins(objective, device, columns)
    return losses.detach()


def _check_gradients(loss: Tensor, pair: int, sides) -> None:
    if not loss.requires_grad:
        return
    for side in sides:
        grads = torch.autograd.grad(loss, (side.logps, side.kl), retain_graph=True, allow_unused=True)
        own = _rows_of_pair(side, pair)
        if any(grad is not None and (grad[: own.start].any() or grad[own.stop :].any()) for grad in grads):
            raise ValueError("objective couples pairs: the loss of one pair depends on another pair's values")


def _check_made_up_margins(objective: MarginLoss, device: torch.device, columns: Mapping[str, Tensor]) -> None:
    """The margin's coefficients must not depend on values that are known only at a pair's end."""
    coefficients = []
    for shift in (0.0, 0.37):
        sides = [_made_up_side(objective, side, device, columns, shift=shift) for side in (0, 1)]
        leaves = [leaf for side in sides for leaf in (side.logps, side.kl)]
        with torch.enable_grad():
            margins = objective.margin(*sides)
            if not margins.requires_grad:
                raise ValueError("margin depends on neither logps nor kl")
            coefficients.append(torch.autograd.grad(margins.sum(), leaves, allow_unused=True, materialize_grads=True))
    for first, second in zip(*coefficients):
        check_linear(objective, first, second)


def check_linear(objective: MarginLoss, coefficients: Tensor, others: Tensor) -> None:
    """Compares a margin's coefficients at two sets of values; on a GPU, where the host must not wait, there.

    Raises:
        ValueError: they differ, so that the margin is not linear. On a GPU a device assertion fails instead.
    """
    message = (
        f"objective has a margin that is not linear in logps and kl, {checks.describe(objective.margin)}; "
        "pass the loss as an ordinary function instead of a MarginLoss"
    )
    scale = torch.maximum(coefficients.abs(), 1e-2 * coefficients.abs().max())
    equal = ((coefficients - others).abs() <= 1e-4 * scale).all()
    if coefficients.device.type == "cuda":
        torch._assert_async(equal, message)
    elif not equal:
        raise ValueError(message)


def _made_up_side(
    objective: Objective, side: int, device: torch.device, columns: Mapping[str, Tensor], shift: float = 0.0
) -> TokenDivergence | TokenRows:
    """Plausible values of three pairs; `shift` changes everything but `tokens` and columns."""
    generator = torch.Generator().manual_seed(7 + side)
    lengths = torch.tensor([2, 3, 4]) + side
    rows = int(lengths.sum())

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(rows, generator=generator)

    logps = draw(-4.0, -0.5) - shift
    ref_logps = logps + draw(-0.5, 0.5) - shift
    kl = draw(0.05, 0.4) * (1 + shift)
    entropy = draw(0.5, 2.0) + shift
    correct = (draw(0.0, 1.0) < 0.5).float()
    values = torch.stack([logps, ref_logps, kl, entropy, correct, torch.ones(rows)])
    if not sees_tokens(objective):
        made_up = TokenDivergence.unstack(segment_sums(values.t(), lengths).t().to(device))
        return made_up._replace(logps=made_up.logps.requires_grad_(), kl=made_up.kl.requires_grad_())
    logps, ref_logps, kl, entropy, correct, tokens = values.to(device).unbind(0)
    return TokenRows(
        logps=logps.requires_grad_(),
        ref_logps=ref_logps,
        kl=kl.requires_grad_(),
        entropy=entropy,
        correct=correct,
        tokens=tokens,
        columns={name: draw(0.1, 1.0).to(device) for name in columns},
        rows_of_pair=lengths.to(device),
    )


def _rows_of_pair(side: TokenDivergence | TokenRows, pair: int) -> slice:
    """A pair's entries in each of the side's fields."""
    if isinstance(side, TokenDivergence):
        return slice(pair, pair + 1)
    first = int(side.rows_of_pair[:pair].sum())
    return slice(first, first + int(side.rows_of_pair[pair]))


def _only_pair(side: TokenDivergence | TokenRows, pair: int) -> TokenDivergence | TokenRows:
    """One pair of made-up values by itself, without a graph."""
    rows = _rows_of_pair(side, pair)
    if isinstance(side, TokenDivergence):
        return TokenDivergence._make(value[rows].detach() for value in side)
    return TokenRows(
        logps=side.logps[rows].detach(),
        ref_logps=side.ref_logps[rows],
        kl=side.kl[rows].detach(),
        entropy=side.entropy[rows],
        correct=side.correct[rows],
        tokens=side.tokens[rows],
        columns={name: column[rows] for name, column in side.columns.items()},
        rows_of_pair=side.rows_of_pair[pair : pair + 1],
    )
