"""Small models of a class, which show what it does where a model itself is too expensive to run, or can't be run.

A class attends within the windows, chunks and selections that its configuration sets. In a stand-in these are a few
tokens long, so that short sequences reach beyond all of them, and random weights let every difference show.
"""

from __future__ import annotations

import copy
import re
import sys
from typing import Any

import torch
from torch import nn

TOKENS = 4  # the longest window, chunk or selection
POSITIONS = 512
_HEADS, _HEAD_DIM = 4, 16
_ON_CPUS = ("sdpa", "eager")  # implementations of attention; others are replaced by the class's default
_MOST_LAYERS = 24
_LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
)

# The largest value of a configuration's integers in a stand-in, by patterns of their names: the first match holds, and
# None keeps a value. An integer that matches nothing may be a window, and is limited to `TOKENS`.
_COUNTS: list[tuple[str, int | None]] = [
    (r"_ids?$|_id_|index$|_idx$|seed|chunk_size_(feed|lm)|pretraining_tp|type_vocab|axial|patch|image|temporal", None),
    (r"vocab", 64),
    (r"position|n_ctx|seq_len|context_length|max_length", POSITIONS),
    (r"first_k|num_dense|num_kv_shared|group", 1),
    (
        r"layer|pattern|interval|period|offset|(^|_)step|cycle|loop|pass|multiple|divisib|factor|(^|_)num_blocks|hash",
        None,
    ),
    (r"per_tok|moe_.*topk|moe_k$|blocks$", 2),
    (r"expert", 4),
    (r"intermediate|ffn|dff|dim_ff|feed_forward|d_inner", 48),
    (r"mamba.*heads", 2 * _HEADS),
    (r"heads$|n_head$", _HEADS),
    (r"(qk|index)_head_dim", 2 * _HEAD_DIM),
    (r"head_(size|dim)$|headdim|d_head|dim_head|kv_channels|lora_rank|rotary_dim", _HEAD_DIM),
    (r"hidden_size$|n_embd|d_model|emb|width$", _HEADS * _HEAD_DIM),
    (r"dim$|rank$|state|num_|^n_", _HEAD_DIM),
]


def small_config(config: Any, *, longest: int = 0, all_windows: bool = True) -> Any:
    """A configuration of few layers, small widths and short windows, otherwise as `config`.

    Args:
        config: of any model.
        longest: tokens of the longest sequence that matters. Rope that changes within them changes early.
        all_windows: shorten windows of `longest` tokens or more too, since rows of several sequences reach beyond them.
    """
    full = config.to_dict()
    windows = sys.maxsize if all_windows else longest
    small = _shrunk(full, _covering(config.get_text_config().to_dict()), windows)
    for part, whole in ((small, full), (small.get("text_config"), full.get("text_config"))):
        if isinstance(part, dict) and isinstance(part.get("rope_parameters"), dict):
            _shrink_rope(part, whole, longest)
    result = type(config).from_dict(small)
    if config._attn_implementation in _ON_CPUS:
        result._attn_implementation = config._attn_implementation
    return result


def _covering(text: dict[str, Any]) -> tuple[int, int]:
    """How many layers there are, and how many of the first ones hold one of each kind.

    Raises:
        ValueError: they are too many for a small model.
    """
    layers = next((text[name] for name in _LAYERS if isinstance(text.get(name), int)), 2)
    fewest = 2
    for name, value in text.items():
        if isinstance(value, list) and len(value) == layers:
            kinds = [repr(item) for item in value]
            if len(set(kinds)) == len(kinds):  # the layers' own numbers
                continue
            fewest = max(fewest, *(kinds.index(kind) + 1 for kind in set(kinds)))
        elif isinstance(value, int) and re.search(r"pattern|interval|period|every", name):
            fewest = max(fewest, value)
    if fewest > _MOST_LAYERS:
        raise ValueError(f"only more than {_MOST_LAYERS} layers would hold one of each kind")
    return layers, min(layers, fewest)


def _shrunk(values: dict[str, Any], kept: tuple[int, int], windows: int) -> dict[str, Any]:
    layers, fewer = kept
    heads = next((values[name] for name in ("num_attention_heads", "n_head") if isinstance(values.get(name), int)), 0)
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("id2label", "label2id", "rope_parameters"):
            small[name] = value
        elif name == "per_layer_config" and isinstance(value, dict):
            small[name] = {layer: _shrunk(own, kept, windows) for layer, own in value.items() if int(layer) < fewer}
        elif isinstance(value, dict):
            small[name] = _shrunk(value, kept, windows)
        elif isinstance(value, list) and len(value) == layers and layers > 0:
            small[name] = [_fewer(name, item, windows) for item in value[:fewer]]
        elif name in _LAYERS:
            small[name] = min(value, fewer) if isinstance(value, int) else value
        elif re.search(r"key_value_heads|kv_heads", name) and isinstance(value, int) and 1 < value < heads:
            small[name] = 2
        else:
            small[name] = _fewer(name, value, windows)
    return small


def _fewer(name: str, value: Any, windows: int) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if re.search(r"(pad|bos|eos)_token_id", name):
        return value % 3
    for pattern, most in _COUNTS:
        if re.search(pattern, name):
            return value if most is None else min(value, most)
    return min(value, TOKENS) if value < windows else value


def _shrink_rope(config: dict[str, Any], full: dict[str, Any], longest: int) -> None:
    """Fits rope to heads of `_HEAD_DIM`. Where `longest` is beyond the positions at which it changes, these are few."""
    config["rope_parameters"] = ropes = copy.deepcopy(config["rope_parameters"])
    own = [value for value in ropes.values() if isinstance(value, dict)]  # of each type of layers
    for rope in own or [ropes]:
        frequencies = int(_HEAD_DIM * (rope.get("partial_rotary_factor") or 1)) // 2
        for name, value in rope.items():
            if name == "mrope_section":
                rope[name] = [part * frequencies // sum(value) for part in value]
            elif isinstance(value, list):
                rope[name] = value[:frequencies]
        kind = rope.get("rope_type") or ""
        limits = {"longrope": "original_max_position_embeddings"}
        limit = "max_position_embeddings" if "dynamic" in kind else limits.get(kind, "")
        for place, whole in ((rope, rope), (config, full)):
            if limit in whole:
                place[limit] = 4 * TOKENS if whole[limit] < longest else POSITIONS


def scaled_down(kind: Any, config: Any, *, longest: int = 0, all_windows: bool = True) -> Any:
    """A model of a class with the `small_config` of a configuration, with random weights in float32, on the CPU.

    Args:
        kind: the class.
        config: the configuration of a model of this class.
        longest, all_windows: as in `small_config`.
    """
    small = small_config(config, longest=longest, all_windows=all_windows)
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)  # and not those of other devices, which are not restored
        model = kind(small).float().eval()
        enliven(model)
    return model


def stand_in(model: Any) -> Any:
    """A small model for one that an engine has spread over processes: on its device, in its precision."""
    small = scaled_down(type(model), model.config).to(device=next(model.parameters()).device, dtype=model.dtype)
    small.set_attn_implementation(model.config._attn_implementation)
    return small


@torch.no_grad()
def enliven(model: nn.Module) -> None:
    """Adds noise of the size of trained weights, so that no part of a model is without effect."""
    for parameter in model.parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 100
        parameter.add_(torch.randn_like(parameter) / fan_in**0.5)


@torch.no_grad()
def shaken(model: Any) -> Any:
    """The model, after a change of its weights that is about the size of rounding errors."""
    generator = torch.Generator("cpu").manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, device="cpu")
        parameter.mul_(1 + 1e-6 * noise.to(parameter.device))
    return model
