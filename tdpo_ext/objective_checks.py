"""Tries an objective on made-up pairs: a loss each, every pair treated alone, and margins that are linear.

An objective of sequences alone (`linear_token_loss`) is tried on such "pairs" of one side.
Objectives see one of two things for each side of some pairs: per-sequence sums (TokenDivergence), or, decorated with
`per_token`, all tokens (TokenRows). They are tried on a few pairs, on each of those alone, and on those among more and
longer ones: a coupling that begins beyond that is not noticed.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import nan
from types import FunctionType, MethodType
from typing import NoReturn

import torch
from torch import Tensor

from . import checks
from .losses import MarginLoss, Objective, sees_tokens
from .made_up_pairs import FEW, MANY, MadeUpPairs, entries
from .vocab_parallel import digest

# What ref_logps and kl are made, one after the other, where there is no reference.
_NO_REFERENCE = (0.3, -40.0, 60.0, nan)
# Errors that an objective's torch code may raise, which one message suffices to make again.
_RETOLD = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError, AssertionError)


@dataclass(frozen=True)
class _Accepted:
    """An objective that has passed, while it lives, and a digest of its losses."""

    reference: weakref.ref
    digest: int


_accepted: dict[object, _Accepted] = {}


def check_objective(
    objective: Objective, device: torch.device, columns: Sequence[str], *, sides: int, has_reference: bool
) -> int:
    """Tries an objective, once, on made-up pairs: a loss each, the same whether it sees a pair alone or among others.

    On the CPU, so that nothing waits for a GPU; where an objective holds tensors of its own on a GPU, there. Returns a
    digest of the losses, which tells objectives apart.

    Args:
        columns: names of the call's token columns.
        sides: 2 for pairs, 1 for sequences alone.
        has_reference: whether an objective may read ref_logps and kl.

    Raises:
        ValueError: it returns something else, couples pairs, or has parameters that want a gradient; or a MarginLoss
            has a margin that is not linear.
    """
    key = _identity(objective, sides, has_reference)
    if key is not None and key in _accepted and _accepted[key].reference() is not None:
        return _accepted[key].digest

    def losses_on(device: torch.device) -> Tensor:
        made_up = MadeUpPairs(
            count=sides,
            without_reference=None if has_reference else _NO_REFERENCE[0],
            tokens=sees_tokens(objective),
            device=device,
            columns=columns,
        )
        return _Trial(objective, made_up, torch.is_grad_enabled()).losses()

    try:
        losses = losses_on(torch.device("cpu"))
    except (RuntimeError, TypeError):
        if device.type == "cpu":
            raise
        losses = losses_on(device)
    found = digest(losses) ^ isinstance(objective, MarginLoss)
    if key is not None:
        _accepted[key] = _Accepted(_reference(objective), found)
    return found


def _identity(objective: Objective, *seen: int) -> object | None:
    """What tells an objective, and what it has seen, from others while it lives; None where it can't be told."""
    if isinstance(objective, MethodType):  # a bound method is a new object at every access
        return (id(objective.__self__), objective.__func__, *seen)
    try:
        weakref.ref(objective)
    except TypeError:
        return None
    return (id(objective), *seen)


def _reference(objective: Objective) -> weakref.ref:
    return weakref.WeakMethod(objective) if isinstance(objective, MethodType) else weakref.ref(objective)


@dataclass(frozen=True)
class _Trial:
    """An objective on made-up pairs."""

    objective: Objective
    made_up: MadeUpPairs
    grad_enabled: bool

    def losses(self) -> Tensor:
        """The losses of a few pairs, (pairs,).

        Raises:
            ValueError: as `check_objective`.
        """
        with torch.inference_mode(False), torch.enable_grad():
            losses = self._losses(FEW)
            self._check_reference_free(losses)
            if not losses.isfinite().all():
                raise ValueError(f"objective returned {losses.tolist()} for {self.made_up.describe(FEW)}")
            for pair in FEW:
                self._check_equal(losses[pair : pair + 1], self._losses([pair]))
            self._check_equal(losses, self._losses(MANY)[: len(FEW)])
            if isinstance(self.objective, MarginLoss):
                self._check_margins(self.objective)
        return losses.detach()

    def _losses(self, pairs: Sequence[int]) -> Tensor:
        """A loss per pair, none of which depends on another pair's values through its gradient."""
        sides = self.made_up.sides(pairs)
        with self._telling(pairs):
            losses = self.objective(*sides)
        if not isinstance(losses, Tensor) or losses.shape != (len(pairs),):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(
                f"objective returned {got} for {self.made_up.describe(pairs)}; a loss per {self.made_up.what} is "
                f"needed, ({len(pairs)},)"
            )
        leaves = [leaf for side in sides for leaf in (side.logps, side.kl)]
        if self.grad_enabled:
            if not losses.requires_grad:
                tried = self.made_up.describe(pairs)
                raise ValueError(f"objective returned losses without a gradient for {tried}: nothing would be learned")
            refuse_parameters(self.objective, losses, leaves)
        for pair in range(len(pairs)) if losses.requires_grad and len(pairs) > 1 else ():
            grads = torch.autograd.grad(losses[pair], leaves, retain_graph=True, allow_unused=True)
            owned = [entries(side, pair) for side in sides for _ in range(2)]
            if any(
                grad is not None and (grad[: own.start].any() or grad[own.stop :].any())
                for grad, own in zip(grads, owned)
            ):
                self._refuse_coupling()
        return losses

    def _check_reference_free(self, losses: Tensor) -> None:
        """Without a reference, what stands in the place of its values must not matter."""
        for value in _NO_REFERENCE[1:] if self.made_up.without_reference is not None else ():
            others = self.objective(*replace(self.made_up, without_reference=value).sides(FEW))
            if not torch.equal(losses, others):
                raise ValueError(
                    "objective reads ref_logps or kl, but there is no reference: ref_hidden and ref_weight are None"
                )

    def _check_equal(self, losses: Tensor, others: Tensor) -> None:
        if not torch.allclose(losses, others, rtol=1e-4, atol=1e-6):
            self._refuse_coupling()

    def _refuse_coupling(self) -> NoReturn:
        what = self.made_up.what
        raise ValueError(
            f"objective couples {what}s: the loss of one {what} depends on which {what}s are beside it, but a batch is "
            f"computed some {what}s at a time (tried on {self.made_up.describe(FEW)}, on each of them alone, and on "
            f"{self.made_up.describe(MANY)})"
        )

    def _check_margins(self, objective: MarginLoss) -> None:
        """The margin's coefficients must not depend on values that are known only at a pair's end."""
        coefficients = []
        for shift in (0.0, 0.37):
            sides = self.made_up.sides(FEW, shift)
            leaves = [leaf for side in sides for leaf in (side.logps, side.kl)]
            with self._telling(FEW):
                margins = objective.margin(*sides)
            if not margins.requires_grad:
                raise ValueError("margin depends on neither logps nor kl")
            coefficients.append(torch.autograd.grad(margins.sum(), leaves, allow_unused=True, materialize_grads=True))
        for first, second in zip(*coefficients):
            check_linear(objective, first, second)

    @contextmanager
    def _telling(self, pairs: Sequence[int]) -> Iterator[None]:
        """Says of an objective's own error what it was tried on."""
        try:
            yield
        except _RETOLD as error:
            if type(error) not in _RETOLD:  # one of the objective's own making
                raise
            message = error.args[0] if error.args else ""
            raise type(error)(
                f"{message} (objective was tried on {self.made_up.describe(pairs)}: it must take any number of "
                f"{self.made_up.what}s, of any lengths)"
            ) from error


def refuse_parameters(objective: Objective, output: Tensor, leaves: Sequence[Tensor]) -> None:
    """Raises where an objective's output has a gradient for anything but the `leaves` that it is taken of.

    Raises:
        ValueError: it names the parameter, where the objective holds it under a name.
    """
    known, seen, nodes = {id(leaf) for leaf in leaves}, set(), [output.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)  # of nodes that accumulate a leaf's gradient
        if leaf is not None and id(leaf) not in known:
            name = next((name for name, held in _held(objective) if held is leaf), "a parameter")
            raise ValueError(
                f"objective uses {name}, {checks.describe(leaf)}, which would get no gradient: gradients reach logps, "
                "kl and token_columns only; detach it, or give it as a token column"
            )
        nodes.extend(before for before, _ in node.next_functions)


def _held(objective: object) -> Iterator[tuple[str, object]]:
    """What a function holds, by name: parameters, attributes, bound arguments, closed-over and global variables."""
    if isinstance(objective, torch.nn.Module):
        yield from objective.named_parameters()
    elif isinstance(objective, functools.partial):
        yield from objective.keywords.items()
        yield from ((f"argument {index}", value) for index, value in enumerate(objective.args))
        yield from _held(objective.func)
    elif isinstance(objective, MethodType):
        yield from _held(objective.__self__)
    elif isinstance(objective, FunctionType):
        found = inspect.getclosurevars(objective)
        for name, value in {**found.nonlocals, **found.globals}.items():
            yield name, value
            if isinstance(value, torch.nn.Module):
                yield from ((f"{name}.{of_module}", parameter) for of_module, parameter in value.named_parameters())
    else:
        for name, value in getattr(objective, "__dict__", {}).items():
            yield name, value
            if callable(value):
                yield from _held(value)


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
