"""What the loss reads of a frozen reference, whatever its form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.causal_lm import CausalLM, ResponseRows
from ..models.heads import HeadParts
from ..models.noise import evaluation_mode

Read = Callable[[CausalLM, dict[str, Any]], ResponseRows]  # CausalLM.hidden_rows or CausalLM.logit_rows


@dataclass(frozen=True)
class Reference(CausalLM):
    """A frozen reference: a causal language model that is run in a context, where its form asks for one."""

    def read_ahead(self, wrapper: nn.Module, batch: dict[str, Any], read: Read) -> dict[str, Any]:
        """The batch, and in it what must be read of the reference before the policy's forward pass begins.

        Args:
            wrapper: the policy, as an engine has wrapped it.
        """
        return batch

    def call(self, wrapper: nn.Module, function: Callable[[Any], Any]) -> Any:
        """What a function of the reference's model returns where that can be run, as an engine wants it.

        Args:
            wrapper: the policy, as an engine has wrapped it.
        """

        def inside() -> Any:
            with self.running(), evaluation_mode(self.model):
                return function(self.model)

        return wrapper(preference=inside)

    def running(self) -> AbstractContextManager[Any]:
        """A context in which `model` is the reference."""
        return nullcontext()

    @torch.no_grad()
    def rows(self, batch: dict[str, Any], read: Read = CausalLM.hidden_rows) -> Tensor:
        """What predicts a batch's response tokens: the head's inputs, (R, D), or what else `read` takes of a model."""
        with self.running(), evaluation_mode(self.model):
            return read(self, batch).values

    @contextmanager
    def whole_head(self) -> Iterator[HeadParts]:
        """A context in which this process holds all that it needs of the head."""
        with self.running():
            head = self.head
        yield head
