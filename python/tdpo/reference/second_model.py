"""A second model as the reference, sharded as an engine shards the policy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled

from ..models.causal_lm import CausalLM
from ..models.forward import patch_forward
from ..models.heads import HeadParts
from ..models.sharding import full_tensor, gathered, is_sharded, is_tensor_parallel
from .reference import Read, Reference


@dataclass(frozen=True)
class SecondModel(Reference):
    """A model of its own, which this process can run."""

    def prepared(self, accelerator: Accelerator) -> SecondModel:
        """The reference, frozen, and sharded if the policy will be."""
        model = self.model.eval().requires_grad_(False)
        state = accelerator.state
        if getattr(state, "deepspeed_plugin", None) is not None:
            engine = _deepspeed_engine(model, copy.deepcopy(state.deepspeed_plugin.deepspeed_config))
            return ShardedModel(**vars(self), wrapper=engine)
        if getattr(getattr(state, "fsdp_plugin", None), "fsdp_version", 1) == 2:
            from accelerate.utils import fsdp2_prepare_model

            model = fsdp2_prepare_model(accelerator, model)
            return ShardedModel(**{**vars(self), "model": model}, wrapper=model)
        return self


@dataclass(frozen=True)
class ShardedModel(SecondModel):
    """A model whose weights an engine spreads over data-parallel processes: it runs through `wrapper` alone."""

    wrapper: Any = None

    def __post_init__(self) -> None:
        patch_forward(self.model)

    def rows(self, batch: dict[str, Any], read: Read = CausalLM.hidden_rows) -> Tensor:
        return self.call(self.wrapper, lambda _: read(self, batch).values)

    @torch.no_grad()
    def call(self, wrapper: nn.Module, function: Callable[[Any], Any]) -> Any:
        return self.wrapper(preference=lambda: function(self.model))

    @contextmanager
    def whole_head(self) -> Iterator[HeadParts]:
        head = self.head
        with gathered(*head.weights, head.bias):
            bias = None if head.bias is None else full_tensor(head.bias)
            yield replace(head, weights=tuple(map(full_tensor, head.weights)), bias=bias)


def copy_of(model: Any) -> nn.Module:
    """A copy of a policy as it starts, loaded again where its weights are spread over processes.

    Raises:
        ValueError: it would have to be loaded, and has no name.
    """
    tensor_parallel = is_tensor_parallel(model)
    if not tensor_parallel and not is_sharded(model):
        return copy.deepcopy(model)
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "ref_model is None, but the policy's weights are spread over processes and have no name: give one"
        )
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    if tensor_parallel:
        options["tp_plan"] = "auto"
    return AutoModelForCausalLM.from_pretrained(name, **options)


def _deepspeed_engine(model: nn.Module, config: dict[str, Any]) -> nn.Module:
    """The model in an engine that trains nothing, but rounds and partitions weights as the policy's does."""
    import deepspeed

    for name in ("optimizer", "scheduler"):
        config.pop(name, None)
    config["zero_optimization"].pop("offload_optimizer", None)
    for name, value in config.items():  # what the trainer fills in later
        if value == "auto":
            config[name] = 1
    zero = config["zero_optimization"]
    if not is_deepspeed_zero3_enabled():
        zero["stage"] = 0  # 1 and 2 partition what belongs to an optimizer
    config["zero_optimization"] = {name: value for name, value in zero.items() if value != "auto"}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    return engine
