"""The policy as it started, as the reference: while that runs, what trains has its first values again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.causal_lm import CausalLM
from ..models.noise import evaluation_mode
from ..models.parameter_values import ParameterValues, named_parameters
from ..models.sharding import full_tensor, is_sharded
from .reference import Head, Read, Reference


@dataclass(frozen=True)
class AtStart(Reference):
    """The policy's own model, with the first values of its parameters.

    Attributes:
        initial: first values of the parameters that train; the others never change.
        head: the names of the head's weight and bias; None for one that is not a parameter.
    """

    initial: ParameterValues = None  # type: ignore[assignment]
    head: tuple[str | None, str | None] = (None, None)

    @classmethod
    def of_policy(cls, policy: CausalLM, model: nn.Module) -> AtStart:
        """The reference of a policy that was not trained yet; `model`: with its adapters."""
        names = {id(parameter): name for name, parameter in named_parameters(model)}
        head = (names.get(id(policy.weight)), names.get(id(policy.bias)))
        return cls(**vars(policy), initial=ParameterValues(model), head=head)

    def running(self) -> AbstractContextManager[Any]:
        return self.initial.in_place()

    def read_ahead(self, wrapper: nn.Module, batch: dict[str, Any], read: Read) -> dict[str, Any]:
        if not is_sharded(self.initial.model):
            return batch
        return {**batch, "ref_rows": self.call(wrapper, lambda _: read(self, batch).values)}

    @torch.no_grad()
    def call(self, wrapper: nn.Module, function: Callable[[Any], Any]) -> Any:
        if not is_sharded(self.initial.model):
            return super().call(wrapper, function)
        with self.running(), evaluation_mode(self.model):  # before the engine gathers parameters
            return wrapper(preference=lambda: function(self.model))

    def rows(self, batch: dict[str, Any], read: Read = CausalLM.hidden_rows) -> Tensor:
        return batch["ref_rows"] if "ref_rows" in batch else super().rows(batch, read)

    @contextmanager
    def whole_head(self) -> Iterator[Head]:
        weight, bias = self.head
        values = self.initial.values
        yield (
            full_tensor(values[weight]) if weight in values else self.weight,
            full_tensor(values[bias]) if bias in values else self.bias,
        )
