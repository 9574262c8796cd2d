"""A loss inside a model's own forward.

A wrapped policy (DDP, FSDP, DeepSpeed) gathers weights and synchronises gradients around its forward. So the loss, head
included, is computed there: `patch_forward` makes `model(preference=batch)` return the loss, and
`model(preference=function)` what `function()` returns; every other call is unchanged.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from .causal_lm import unwrap_peft


def patch_forward(model: nn.Module, function: Callable[[Any], Any] | None = None) -> None:
    """Makes `model(preference=batch)` return `function(batch)`, whatever wraps the model later.

    Called again, it gives the model another function. The model doesn't keep `function` (an object or a method) alive,
    and copies of the model don't have it: a model outlives its trainers, which would otherwise leave their references
    with it.
    """
    causal_lm: Any = unwrap_peft(model)
    known = vars(causal_lm).get("_preference_loss")
    if known is None or not known.is_of(function):  # otherwise compiled code would be made again
        causal_lm._preference_loss = _Borrowed(function)
    if "_plain_forward" not in vars(causal_lm):  # of the first trainer; what wraps it since then stays around it
        causal_lm._plain_forward = causal_lm.forward
        # A bound method, so that a deep copy of the model forwards through itself.
        causal_lm.forward = MethodType(_forward, causal_lm)


class _Borrowed:
    """A function that is not kept alive, and that copies don't have."""

    def __init__(self, function: Callable[[Any], Any] | None) -> None:
        reference = weakref.WeakMethod if isinstance(function, MethodType) else weakref.ref
        self._reference = (lambda: None) if function is None else reference(function)

    def is_of(self, function: Callable[[Any], Any] | None) -> bool:
        return function is not None and self._reference() is function

    def __call__(self, batch: Any) -> Any:
        function = self._reference()
        if function is None:
            raise RuntimeError("this model has no preference loss: its trainer is gone, or it is a copy")
        return function(batch)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Borrowed:
        return _Borrowed(None)


def _forward(self, *args: Any, preference: Any = None, **kwargs: Any) -> Any:
    if preference is None:
        return self._plain_forward(*args, **kwargs)
    return preference() if callable(preference) else self._preference_loss(preference)
