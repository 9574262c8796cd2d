"""Values that can take the place of a model's own parameters, whatever engine shards them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from .sharding import gathered, resharded, rewritten


class ParameterValues:
    """A copy of the values of a model's trainable parameters, by name, which can be put in their place later.

    Args:
        model: with its adapters. An engine may shard its parameters afterwards.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.values: dict[str, Tensor] = {}
        for name, parameter in named_parameters(model):
            if parameter.requires_grad:
                with gathered(parameter):
                    self.values[name] = parameter.detach().clone()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the parameters have these values; afterwards they have their own again, bit for bit.

        It changes parameters in place: no backward pass may be due for what was computed before.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        with resharded(self.model):
            parameters = dict(named_parameters(self.model))
            with rewritten(*(parameters[name] for name in self.values)):
                for name in self.values:
                    self.values[name] = value = _laid_out_as(parameters[name], self.values[name])
                    _swap(_local(parameters[name]), _local(value))


def _swap(some: Tensor, other: Tensor) -> None:
    kept = some.clone()
    some.copy_(other)
    other.copy_(kept)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A model's parameters by the names that they have before activation checkpointing wraps its layers."""
    for name, parameter in model.named_parameters():
        yield name.replace("_checkpoint_wrapped_module.", ""), parameter


def _laid_out_as(parameter: Tensor, value: Tensor) -> Tensor:
    """A value on the device of its parameter, rounded and sharded as an engine has rounded and sharded that."""
    value = value.to(parameter.device, parameter.dtype)
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # rank 0's, as FSDP takes them
    return value
