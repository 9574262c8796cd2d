"""The policy without its adapters as the reference, where it starts as the model that they were added to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models.adapters import frozen_parts_kept
from ..models.digest import weights_digest
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


def reference_digest(model: nn.Module) -> str:
    """The digest of a reference's weights: new adapters, which change nothing, are no part of it."""
    return weights_digest(model, with_adapters=not starts_without_adapters(model))


def digests_at_start(model: nn.Module, ref_model: nn.Module | None) -> dict[str, str]:
    """The digests of the policy's weights and of the reference's, by the names of the arguments.

    New adapters, of which some start from a decomposition that is not the same on every machine, are added later.
    """
    digest = reference_digest(model)
    return {"model": digest, "ref_model": digest if ref_model is None else reference_digest(ref_model)}


def starts_without_adapters(model: Any) -> bool:
    """Whether a policy starts as the model without its adapters, and trains nothing else.

    So it is with new LoRA adapters, whose product is 0. It is not with adapters that were trained before, with
    initialisations that move a part of the weights into the adapters (PiSSA, OLoRA, ...), or with weights that train
    beside them (biases, `modules_to_save`, what a user has unfrozen).
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
    """Whether an adapter leaves the output of a LoRA layer as it is, and can be told to do so by its matrices alone."""
    if layer.merged or layer.lora_bias.get(adapter) or adapter in layer.lora_variant:
        return False
    matrices: list[Tensor] = [factor[adapter].weight for factor in (layer.lora_A, layer.lora_B) if adapter in factor]
    matrices += [layer.lora_embedding_A[adapter]] if adapter in layer.lora_embedding_A else []
    partitioned = any(map(is_partitioned, matrices))
    return not matrices or (not partitioned and any(not matrix.any() for matrix in matrices))
