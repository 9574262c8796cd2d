"""Attention masks of pairs whose prompt stands in the input once: both responses see it, and not each other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_WITH_MASKS = ("sdpa", "eager")  # implementations of attention that take a mask of any form
_LAYER_TYPES = {"full_attention", "sliding_attention"}


def takes_any_mask(config: Any) -> bool:
    """Whether `branch_masks` can serve all layers of a model with this configuration."""
    types = set(getattr(config.get_text_config(), "layer_types", None) or _LAYER_TYPES)
    return config._attn_implementation in _WITH_MASKS and types <= _LAYER_TYPES


def branch_masks(config: Any, dtype: torch.dtype, positions: Tensor, segments: Tensor) -> Tensor | dict[str, Tensor]:
    """The masks of a model's layers, in the form in which transformers takes them as they are.

    Args:
        config: of the model, which `takes_any_mask` accepts.
        dtype: of the masks that eager attention adds to its scores.
        positions, segments: (B, T), as `PreferenceCollator` makes them.

    Returns:
        A mask, (B, 1, T, T), or one for each type of layer where a model has both.
    """
    text = config.get_text_config()
    window, types = getattr(text, "sliding_window", None), set(getattr(text, "layer_types", None) or ())
    allowed = branch_mask(segments)
    masks = {"full_attention": allowed}
    if window is not None:
        near = positions[:, None, :, None] - positions[:, None, None, :] < window
        masks["sliding_attention"] = allowed & near
    if config._attn_implementation == "eager":
        lowest = torch.finfo(dtype).min
        masks = {name: torch.where(mask, 0.0, lowest).to(dtype) for name, mask in masks.items()}
    if "sliding_attention" in types:
        return masks
    # Without types of layers, or with one, all layers share a mask: that of the window where the model has one.
    return masks["full_attention"] if types or window is None else masks["sliding_attention"]


def branch_mask(segments: Tensor) -> Tensor:
    """Which tokens attend to which, (B, 1, T, T), true where the query (second to last) sees the key (last).

    Args:
        segments: (B, T): 3 p in the prompt of pair p, 3 p + 1 in its chosen and 3 p + 2 in its rejected response; -1
            in padding, which sees padding alone.
    """
    queries, keys = segments[:, None, :, None], segments[:, None, None, :]
    order = torch.arange(segments.shape[1], device=segments.device)
    same_pair = queries.div(3, rounding_mode="floor") == keys.div(3, rounding_mode="floor")
    visible = (keys == queries) | (keys % 3 == 0)
    return (order[:, None] >= order) & same_pair & visible
