"""CPU tensors in the memory of CUDA tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_CPU = torch.device("cpu")


def on_cpu(tensor: Tensor) -> Tensor:
    """The CPU tensor that lies in a CUDA tensor's memory. It owns none of it."""
    if tensor.layout != torch.strided:
        raise NotImplementedError("virtual GPU: only strided tensors")
    storage = tensor.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_CPU)
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes())
    alias = torch.empty(0, dtype=tensor.dtype, device=_CPU)
    alias = alias.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
    if tensor.is_conj():
        alias = torch._conj(alias)
    return torch._neg_view(alias) if tensor.is_neg() else alias


def bytes_on_cpu(tensor: Tensor) -> Tensor:
    """All bytes of a CUDA tensor's storage, as a CPU tensor."""
    storage = tensor.untyped_storage()
    memory = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), _CPU, storage.nbytes())
    return torch.empty(0, dtype=torch.uint8, device=_CPU).set_(memory)


def mapped(value: Any, function: Callable[[Tensor], Any]) -> Any:
    """A value with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        items = [mapped(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in a value."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def device_of(*values: Any) -> int | None:
    """The index of the first CUDA tensor's device in some values; None without such a tensor."""
    for value in values:
        for tensor in tensors_in(value):
            if tensor.is_cuda:
                return tensor.device.index
    return None
