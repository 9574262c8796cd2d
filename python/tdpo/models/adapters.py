"""Which adapters the loss can train: those inside layers, since it runs the model inside peft's, not peft's forward."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def frozen_parts_kept(model: nn.Module) -> Iterator[None]:
    """A context after which the same parameters train as before: peft lets all of an adapter train that it turns on."""
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in trains:
            parameter.requires_grad_(trained)


def has_adapters(model: nn.Module) -> bool:
    """Whether a model is one of peft's, or has adapters of peft inside."""
    return hasattr(model, "get_base_model") or any(_adapted_layers(model))


def check_adapters(name: str, model: Any) -> None:
    """Refuses adapters of a kind that the loss can't run.

    Args:
        name: of the argument.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        _check_kind(name, config)


def check_active(model: nn.Module) -> None:
    """Refuses adapters of a policy that can't train as they are: merged into its weights, or disabled."""
    for layer in _adapted_layers(model):
        if layer.merged:
            raise ValueError("model has adapters that are merged into its weights: unmerge them (unmerge_adapter)")
        if layer.disable_adapters:
            raise ValueError("model has adapters that are disabled: enable them (enable_adapter_layers)")


def check_new_adapters(model: nn.Module, peft_config: Any) -> None:
    """Refuses a `peft_config` of a kind that the loss can't run, or for a model that has adapters already."""
    from peft import PeftConfig

    if not isinstance(peft_config, PeftConfig):
        raise TypeError(f"peft_config is {peft_config!r}; a configuration of peft, such as LoraConfig, is needed")
    if has_adapters(model):
        raise ValueError(
            "peft_config is given, but model has adapters already: leave peft_config out to train them, or merge them "
            "into the model first (merge_and_unload)"
        )
    _check_kind("peft_config", peft_config)


def _check_kind(name: str, config: Any) -> None:
    """Refuses kinds that do more than change layers."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    kind = getattr(config.peft_type, "value", config.peft_type)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    if config.is_prompt_learning:
        reason = "puts tokens or states of its own before the text"
    elif getattr(config, "alora_invocation_tokens", None):
        kind, reason = "activated LoRA", "begins at a token that only peft's own forward looks for"
    elif hasattr(tuner, "update_and_allocate") and getattr(config, "use_asa", True):
        reason = "must be told of every step"
    elif isinstance(tuner, type) and issubclass(tuner, BaseTuner) and tuner.forward is not BaseTuner.forward:
        reason = "works in peft's own forward"
    else:
        return
    raise ValueError(f"{name} has adapters of the kind {kind}, which {reason}: use LoRA or another kind inside layers")


def _adapted_layers(model: nn.Module) -> Iterator[Any]:
    if "peft" in sys.modules:  # otherwise there are none, and to import it takes seconds
        from peft.tuners.tuners_utils import BaseTunerLayer

        yield from (module for module in model.modules() if isinstance(module, BaseTunerLayer))
