"""The precision of forward passes, and whether the weights that train can hold small steps."""

from __future__ import annotations

import logging
import math
import os
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from .models.causal_lm import unwrap_peft
from .models.sharding import local_values

logger = logging.getLogger(__name__)
MIXED_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by accelerate's names
_SAMPLED_WEIGHTS = 1_000_000  # enough for their typical size


def autocast(args: TrainingArguments) -> AbstractContextManager[Any]:
    """The context in which policy and reference compute: autocast with `bf16`, `fp16` or accelerate's own choice.

    Accelerate enters it around the policy's forward pass alone. Whatever else runs a model (probes, the reference
    cache, samples) enters it here, and so sees the model that trains; some attentions run in low precision only.
    """
    dtype = autocast_dtype(args)
    return nullcontext() if dtype is None else torch.autocast(args.device.type, dtype)


def autocast_dtype(args: TrainingArguments) -> torch.dtype | None:
    """The precision of autocast; None without."""
    chosen = "bf16" if args.bf16 else "fp16" if args.fp16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return MIXED_PRECISIONS.get(chosen)


def check_attention(name: str, model: nn.Module, args: TrainingArguments) -> None:
    """Checks that the attention of the model in the argument `name` supports the precision it would run in.

    Raises:
        ValueError: flash attention in float32.
    """
    model = unwrap_peft(model)
    attention = str(getattr(getattr(model, "config", None), "_attn_implementation", ""))
    if "flash" in attention and getattr(model, "dtype", None) == torch.float32 and autocast_dtype(args) is None:
        raise ValueError(
            f"the attention of {name} is {attention}, which computes in bfloat16 or float16 only, but its weights are "
            "float32: set bf16"
        )


def trained_dtypes(model: nn.Module) -> str:
    """The precisions of the weights that train."""
    return ", ".join(sorted({_name(weights.dtype) for weights in model.parameters() if weights.requires_grad}))


class WarnOfCoarseWeights(TrainerCallback):
    """Warns, when training starts, how small a step is beside the spacing of low-precision weights that train."""

    def on_train_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any = None, **others: Any) -> None:
        if not state.is_world_process_zero:
            return
        groups = optimizer.param_groups
        learning_rate = max(group.get("initial_lr", group["lr"]) for group in groups)
        by_dtype: dict[torch.dtype, list[Tensor]] = defaultdict(list)
        for group in groups:  # an engine may keep the model's own parameters in another precision than it trains
            for weights in group["params"]:
                by_dtype[weights.dtype].append(local_values(weights).detach())
        for dtype in MIXED_PRECISIONS.values():
            if dtype in by_dtype:
                logger.warning("%s", _sentence(dtype, typical_size(by_dtype[dtype]), learning_rate))


def _sentence(dtype: torch.dtype, size: float, learning_rate: float) -> str:
    gap = spacing(size, dtype)
    return (
        f"{_name(dtype)} weights train: a step of the learning rate, {learning_rate:g}, is {learning_rate / gap:.2g} "
        f"of the spacing of a typical weight ({gap:.2g} at {size:.2g}), and less than half a spacing is rounded away; "
        "float32 weights keep every step (with bf16 they still compute in bfloat16)"
    )


def typical_size(parameters: Iterable[Tensor]) -> float:
    """The median of the absolute values that are not 0, over a sample of all elements; 0 if there are none."""
    parameters = list(parameters)
    every = max(1, sum(weights.numel() for weights in parameters) // _SAMPLED_WEIGHTS)
    sizes = torch.cat([weights.flatten()[::every].abs().float().cpu() for weights in parameters])
    sizes = sizes[sizes > 0]
    return sizes.median().item() if len(sizes) else 0.0


def spacing(size: float, dtype: torch.dtype) -> float:
    """The distance from a positive number to the next larger one of its type."""
    limits = torch.finfo(dtype)
    return limits.eps * 2.0 ** math.floor(math.log2(max(size, limits.tiny)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
