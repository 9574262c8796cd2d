"""The policy as it started, as the reference: while that runs, what trains has its first values again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.causal_lm import CausalLM
from ..models.heads import HeadParts
from ..models.noise import evaluation_mode
from ..models.parameter_values import ParameterValues, named_parameters
from ..models.sharding import full_tensor, is_sharded
from .reference import Read, Reference


@dataclass(frozen=True)
class AtStart(Reference):
    """The policy's own model, with the first values of its parameters.

    Attributes:
        initial: first values of the parameters that train; the others never change.
        of_head: names of the head's bias and of its weights; None for what is not a parameter.
    """

    initial: ParameterValues = None  # type: ignore[assignment]
    of_head: tuple[str | None, ...] = ()

    @classmethod
    def of_policy(cls, policy: CausalLM, model: nn.Module) -> AtStart:
        """The reference of a policy that was not trained yet; `model`: with its adapters."""
        names = {id(parameter): name for name, parameter in named_parameters(model)}
        of_head: tuple[str | None, ...] = ()
        if policy.fallback_reason is None:
            of_head = tuple(names.get(id(tensor)) for tensor in (policy.head.bias, *policy.head.weights))
        return cls(**vars(policy), initial=ParameterValues(model), of_head=of_head)

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
    def whole_head(self) -> Iterator[HeadParts]:
        values, head = self.initial.values, self.head
        bias, *weights = (
            full_tensor(values[name]) if name in values else now
            for name, now in zip(self.of_head, (head.bias, *head.weights))
        )
        yield replace(head, weights=tuple(weights), bias=bias)  # type: ignore[arg-type]
