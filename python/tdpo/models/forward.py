"""A loss inside a model's own forward.

A wrapped policy (DDP, FSDP, DeepSpeed) gathers weights and synchronises gradients around its forward. So the loss, head
included, is computed there: `patch_forward` makes `model(preference=batch)` return the loss, and
`model(preference=function)` what a function returns that runs the model, and leaves every other call unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

from .causal_lm import unwrap_peft


def patch_forward(model: nn.Module, function: Callable[[Any], Any] | None = None) -> None:
    """Makes `model(preference=batch)` return `function(batch)`, whatever wraps the model later."""
    causal_lm = unwrap_peft(model)
    causal_lm._plain_forward, causal_lm._preference_loss = causal_lm.forward, function  # type: ignore[assignment]
    # A bound method, so that a deep copy of the model forwards through itself.
    causal_lm.forward = MethodType(_forward, causal_lm)


def _forward(self, *args: Any, preference: Any = None, **kwargs: Any) -> Any:
    if preference is None:
        return self._plain_forward(*args, **kwargs)
    return preference() if callable(preference) else self._preference_loss(preference)
