"""The policy without its adapters as the reference, where the adapters change nothing at the start."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..models.adapters import frozen_parts_kept
from ..models.sharding import is_partitioned
from .reference import Reference


@dataclass(frozen=True)
class WithoutAdapters(Reference):
    """The policy's own model; `adapted`, the peft model around it, takes its adapters out while it runs."""

    adapted: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        with frozen_parts_kept(self.adapted), self.adapted.disable_adapter():
            yield


def starts_without_adapters(model: Any) -> bool:
    """Whether a policy starts as the model without its adapters, and trains nothing but them.

    That is true of new LoRA adapters, whose product is 0. It is false of adapters that were trained before, of
    initialisations that move a part of the weights into the adapters (PiSSA, OLoRA, ...), and where other weights train
    too (biases, `modules_to_save`, what a user has unfrozen).
    """
    if not hasattr(model, "disable_adapter"):
        return False
    from peft.tuners.lora import LoraLayer

    added: set[int] = set()  # the parameters of adapters
    for module in model.modules():
        if hasattr(module, "_disable_adapters"):  # of any kind
            if not isinstance(module, LoraLayer):
                return False
            layer: Any = module
            if not all(_adds_nothing(layer, name) for name in layer.active_adapters):
                return False
            added |= {id(p) for name, p in layer.named_parameters() if not name.startswith("base_layer.")}
    return all(id(parameter) in added for parameter in model.parameters() if parameter.requires_grad)


def _adds_nothing(layer: Any, adapter: str) -> bool:
    """Whether an adapter leaves the output of a LoRA layer as it is, as far as its matrices can tell."""
    if layer.merged or layer.lora_bias.get(adapter) or adapter in layer.lora_variant:
        return False
    matrices: list[Tensor] = [factor[adapter].weight for factor in (layer.lora_A, layer.lora_B) if adapter in factor]
    matrices += [layer.lora_embedding_A[adapter]] if adapter in layer.lora_embedding_A else []
    partitioned = any(map(is_partitioned, matrices))
    return not matrices or (not partitioned and any(not matrix.any() for matrix in matrices))
