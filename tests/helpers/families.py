"""Small random models of all families of causal language models in transformers, and plain arithmetic beside them."""

from __future__ import annotations

import copy
import sys

import torch
import transformers
from tdpo.models.stand_ins import TOKENS, enliven, small_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tdpo_ext import eager, tdpo_loss

VOCABULARY = 64
BETA, ALPHA = 0.1, 0.5

# What the defaults of a configuration leave open, or that can't be made small.
_OPTIONS: dict[str, dict] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "deepseek_v2": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "falcon_h1": {"mamba_d_ssm": None},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "mamba2": {"expand": 1, "num_heads": 64, "head_dim": 64},
    "ministral": {"head_dim": 16},
    "mistral": {"sliding_window": 4096},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 8},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "rwkv": {"rescale_every": 0},  # otherwise evaluation changes the weights, and a copy of them is another model
    "xmod": {"default_language": "en_XX"},
}

_LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [4.0] * 48}
_LONGROPE |= {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
# Other configurations of a family: their names in the table, their model type and their options.
VARIANTS: dict[str, tuple[str, dict]] = {
    "llama, dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 24},
    ),
    "llama, yarn": (
        "llama",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}, "max_position_embeddings": 128},
    ),
    "phi3, longrope": ("phi3", {"rope_parameters": _LONGROPE, "original_max_position_embeddings": 16}),
    "phi3, sliding window": ("phi3", {"sliding_window": 2047}),
    "qwen2, sliding window": ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
    "starcoder2, sliding window": ("starcoder2", {"sliding_window": 4096}),
    "falcon, alibi": ("falcon", {"alibi": True}),
    "granitemoehybrid, dense": (
        "granitemoehybrid",
        {"num_local_experts": 0, "num_experts_per_tok": 0, "layer_types": ["attention"] * 32},
    ),
    "qwen3_moe, dense": ("qwen3_moe", {"mlp_only_layers": list(range(48)), "num_hidden_layers": 48}),
}


def names() -> list[str]:
    """Every family, and every variant."""
    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS]


def family_config(name: str):
    """A small configuration. Raises what the configuration or its class raises where it has none."""
    kind, options = VARIANTS.get(name, (name, _OPTIONS.get(name, {})))
    config_class = transformers.CONFIG_MAPPING[kind]
    if hasattr(config_class(), "is_decoder"):
        options = {**options, "is_decoder": True}
    return small_config(config_class(**options), longest=sys.maxsize)


def make_family(name: str, seed: int = 0, config=None) -> nn.Module:
    """A small model with weights large enough to show differences.

    Raises:
        ValueError: it is not small.
    """
    config = family_config(name) if config is None else config
    with torch.device("meta"):
        size = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    if size > 3e6:
        raise ValueError(f"it stays large: {size:,} parameters")
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    enliven(model)
    return model


def copied(model: nn.Module) -> nn.Module:
    """The same model once more: what some models keep of a forward pass can't be deep-copied."""
    other = type(model)(copy.deepcopy(model.config))
    other.load_state_dict(model.state_dict())
    return other.eval()


def perturbed(model: nn.Module, size: float = 0.02) -> nn.Module:
    """Another model near to this one, as a policy is to its reference."""
    other = copied(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(size * torch.randn_like(parameter) * parameter.abs().mean())
    return other


def make_tokenizer():
    """As many words as the models have."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w3")), pad_token="w0", eos_token="w2"
    )


def make_rows(reach: int = 6 * TOKENS, seed: int = 7) -> list[dict[str, list[int]]]:
    """Pairs that reach beyond the windows of the models: a long prompt, short ones before a long response, none."""
    draw = torch.Generator().manual_seed(seed)
    lengths = [(3, 4, 2), (2 * reach, 5, 9), (1, 2 * reach + 3, 4), (5, 2, reach), (0, 3, 6)]
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [
        {side: torch.randint(3, VOCABULARY, (n,), generator=draw).tolist() for side, n in zip(sides, pair)}
        for pair in lengths
    ]


def plain_loss(policy: nn.Module, reference: nn.Module, rows: list[dict[str, list[int]]]):
    """TDPO2 by plain arithmetic: each sequence alone, without padding, from the models' own logits in float32.

    Returns:
        The mean loss, and of the chosen and of the rejected sequences the log-probabilities and the KL.
    """
    sides = []
    for side in ("chosen_ids", "rejected_ids"):
        sequences = []
        for row in rows:
            ids = torch.tensor(row["prompt_ids"] + row[side])
            first = max(len(row["prompt_ids"]), 1)
            with torch.no_grad():
                ref_logits = reference(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1].float()
            logits = policy(input_ids=ids[None], use_cache=False).logits[0, first - 1 : -1].float()
            sequences.append(eager.token_divergence(logits[None], ref_logits[None], ids[None, first:]).per_sequence())
        sides.append(type(sequences[0])._make(torch.cat(values) for values in zip(*sequences)))
    return tdpo_loss(*sides, beta=BETA, alpha=ALPHA).mean(), *sides
