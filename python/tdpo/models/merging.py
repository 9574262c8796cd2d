"""Adapters merged into the weights of the model that they were trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def merge_adapters(adapted: Any) -> Any:
    """The model inside a PeftModel, with the adapters merged into its weights, in their precision.

    Adapters of a head or of an embedding that share one weight would be merged into both: each then gets its own, and
    the configuration says so, unless they are equal in the end.
    """
    shared = _separate(adapted)
    merged = adapted.merge_and_unload()
    if shared:
        _share_again(merged)
    return merged


def _separate(adapted: Any) -> bool:
    """Gives the head a weight of its own, where it shares the embedding's and one of them has adapters.

    Returns:
        Whether it did.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    causal_lm = adapted.get_base_model()
    layers = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    bases: list[Any] = [layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers]
    embedding, head = bases
    if not any(isinstance(layer, BaseTunerLayer) for layer in layers) or head.weight is not embedding.weight:
        return False
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    return True


def _share_again(merged: Any) -> None:
    """Lets the head share the embedding's weight if they are equal, and the configuration say whether it does."""
    embedding, head = merged.get_input_embeddings(), merged.get_output_embeddings()
    equal = torch.equal(head.weight, embedding.weight)
    if equal:
        head.weight = embedding.weight
    for config in (merged.config, merged.config.get_text_config()):
        config.tie_word_embeddings = equal
