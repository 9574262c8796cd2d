"""How DeepSpeed, FSDP and tensor parallelism spread weights over processes, and what this process can see of them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled


def is_partitioned(tensor: Any) -> bool:
    """Whether DeepSpeed ZeRO-3 has split a parameter, so that this process holds one part."""
    return hasattr(tensor, "ds_id")


def is_sharded(model: nn.Module) -> bool:
    """Whether an engine has spread a model over data-parallel processes, so that only its wrapper can run it."""
    fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    return fsdp or any(map(is_partitioned, model.parameters()))


def will_be_spread(args: TrainingArguments) -> bool:
    """Whether an engine spreads the weights over data-parallel processes when training begins: FSDP or ZeRO-3."""
    return bool(args.fsdp or os.environ.get("ACCELERATE_USE_FSDP")) or is_deepspeed_zero3_enabled()


def is_tensor_parallel(model: nn.Module) -> bool:
    """Whether transformers has split a model's layers over the processes."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def gathered(*parameters: Tensor | None) -> AbstractContextManager[Any]:
    """A context that all processes enter, where parameters that ZeRO-3 partitions are whole, to be read only."""
    return _gathered(parameters, modifier_rank=None)


def rewritten(*parameters: Tensor) -> AbstractContextManager[Any]:
    """As `gathered`, but the values may be changed, by all processes alike."""
    return _gathered(parameters, modifier_rank=0)


def _gathered(parameters: Iterable[Tensor | None], modifier_rank: int | None) -> AbstractContextManager[Any]:
    partitioned = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not partitioned:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(partitioned, modifier_rank=modifier_rank)


def use_head_without_its_forward(model: Any) -> None:
    """Has ZeRO-3 gather a model's head for the model's forward and backward passes, though not the head is called.

    It must be told so before the forward pass begins, when it may gather the head for a call that is not made.
    """
    for parameter in model.get_output_embeddings().parameters(recurse=False):
        if is_partitioned(parameter):
            import deepspeed

            deepspeed.zero.register_external_parameter(model, parameter)


def gather_without_forward(module: nn.Module) -> None:
    """Has FSDP gather the parameters of a module whose own forward, before which it would do so, is not called."""
    if isinstance(module, FSDPModule):
        module.unshard()


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """A context in which FSDP keeps no parameter gathered; what it has kept is gathered again from the new values."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    kept = [module for module in modules if not all(isinstance(p, DTensor) for p in module.parameters())]
    for module in modules:
        module.reshard()
    yield
    for module in kept:
        module.unshard()


def local_values(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter."""
    if is_partitioned(parameter):
        return parameter.ds_tensor  # type: ignore[attr-defined]
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def whole_size(parameter: Any) -> int:
    """The number of elements that all processes together hold of a parameter."""
    return parameter.ds_numel if is_partitioned(parameter) else parameter.numel()


def full_tensor(tensor: Tensor) -> Tensor:
    """A tensor gathered from all ranks where it is a DTensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
