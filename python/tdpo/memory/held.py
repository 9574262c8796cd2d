"""What a training holds from its first step to its last: weights, gradients, optimizer states, the reference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from ..config import TDPOConfig
from ..models.causal_lm import unwrap_peft
from ..models.without_weights import weight_bytes
from ..options import ModelOptions
from ..reference.choose import trains_little


@dataclass(frozen=True)
class HeldReference:
    """The frozen reference: in which form, in words, and its bytes beside the policy's weights."""

    form: str
    bytes: int


def gradient_bytes(policy: nn.Module) -> int:
    """Bytes of the gradients of everything that trains, each in its parameter's precision."""
    return sum(parameter.nbytes for parameter in _trained(policy))


def optimizer_bytes(policy: nn.Module, args: TDPOConfig) -> int | None:
    """Bytes of the optimizer's states, from a step that it takes on tensors without memory; None where it can't."""
    parameters = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in _trained(policy)]
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(args, policy)  # type: ignore[arg-type]
        of_kernels = {"fused", "foreach"}  # which need a device
        options = {name: value for name, value in options.items() if name not in of_kernels} | {"lr": 1e-3}
        optimizer = kind(parameters, **options)
        optimizer.step()
    except Exception:  # packages, devices or values that an optimizer needs
        return None
    states = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in states if isinstance(value, Tensor))


def held_reference(policy: Any, reference: Any, models: ModelOptions, args: TDPOConfig) -> HeldReference:
    """The form that `reference.choose` gives the reference, and its bytes.

    Args:
        policy: with its adapters, without weights.
        reference: the model that is named for it, without weights, or None.
    """
    if args.precompute_reference:
        head = unwrap_peft(policy if reference is None else reference).get_output_embeddings()
        return HeldReference("its head; hidden states are cached on disk", sum(p.nbytes for p in head.parameters()))
    if reference is not None:
        return HeldReference("a model of its own", weight_bytes(reference, in_4bit=models.load_in_4bit))
    if models.lora_r > 0:
        return HeldReference("the policy without its adapters", 0)
    if trains_little(policy):
        return HeldReference("the first values of what trains", gradient_bytes(policy))
    return HeldReference("a copy of the policy", weight_bytes(policy, in_4bit=models.load_in_4bit))


def _trained(policy: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in policy.parameters() if parameter.requires_grad]
