"""Functions that torch.compile calls instead of tracing them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def breaks_graph(reason: str) -> Callable[[Function], Function]:
    """Decorator with the effect of `torch.compiler.disable(reason=reason)`, without importing torch's compiler.

    The compiler takes longer to import than all else of torch, and who compiles nothing needs none of it.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def called(*arguments, **options):
            if "torch._dynamo" in sys.modules:
                return torch.compiler.disable(function, reason=reason)(*arguments, **options)
            return function(*arguments, **options)

        # What torch.compiler.disable marks its functions with: a call that is being traced ends the graph and says why.
        called._torchdynamo_disable = True  # type: ignore[attr-defined]
        called._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return called  # type: ignore[return-value]

    return decorate


runs_eagerly = breaks_graph("tdpo_ext's fused losses plan by the lengths of a batch and run as they are")
