"""What the loss reads of a frozen reference, whatever its form."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.causal_lm import CausalLM, ResponseRows

Read = Callable[[CausalLM, dict[str, Tensor]], ResponseRows]  # CausalLM.hidden_rows or CausalLM.logit_rows
Head = tuple[Tensor, Tensor | None]  # weight (V, D) and bias (V,)


class Reference(Protocol):
    """The frozen reference.

    Attributes:
        weight, bias: of its head, (V, D) and (V,); the bias may be None.
        softcap, logit_scale, fallback_reason: those of `CausalLM`.
    """

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    @property
    def softcap(self) -> float | None: ...

    @property
    def logit_scale(self) -> float: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def fallback_reason(self) -> str | None: ...

    def rows(self, batch: dict[str, Tensor], read: Read = CausalLM.hidden_rows) -> Tensor:
        """What predicts the response tokens of a batch: hidden states, (R, D), or what else `read` takes of a model."""

    def whole_head(self) -> AbstractContextManager[Head]:
        """A context in which this process holds all that it needs of the head's weight and bias."""


@dataclass(frozen=True)
class ModelReference(CausalLM):
    """A reference that is a model, which can be run."""

    def running(self) -> AbstractContextManager[Any]:
        """A context in which `model` is the reference."""
        return nullcontext()

    @torch.no_grad()
    def rows(self, batch: dict[str, Tensor], read: Read = CausalLM.hidden_rows) -> Tensor:
        with self.running():
            return read(self, batch).values

    def whole_head(self) -> AbstractContextManager[Head]:
        return nullcontext((self.weight, self.bias))
