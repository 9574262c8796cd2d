"""Models as the options name them, but without weights: built from their configurations, on tensors without memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from ..options import ModelOptions, require
from .causal_lm import unwrap_peft
from .loading import adapters_folder, base_of, loaded_dtype, lora_config, merges_adapters
from .names import check_exists

# In which tensors have shapes and dtypes but no memory.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
# Of bitsandbytes' 4-bit weights: two in a byte, and a float32 scale of every 64.
_WEIGHTS_IN_A_BYTE, _BLOCK, _SCALE = 2, 64, 4


def empty_policy(options: ModelOptions) -> Any:
    """The policy with its adapters, new or its own, as it is trained; fake tensors on the CPU.

    Raises:
        ValueError: there is no such model, or its checkpoint is quantized; the message names it.
    """
    own = None if merges_adapters(options) else adapters_folder(require(options, "model"))
    model = _empty_model(options, "model", "gguf_file")
    if own is not None:
        from peft import PeftConfig

        adapters: Any = PeftConfig.from_pretrained(str(own))
        adapters.inference_mode = False
    else:
        adapters = lora_config(options)
    if adapters is not None:
        from peft import get_peft_model

        with torch.device("meta"):
            model = get_peft_model(model, adapters)
    return _on_the_cpu(model)


def empty_reference(options: ModelOptions) -> Any:
    """The model that is named for the reference, its adapters left out; or None where none is named."""
    return None if options.ref_model is None else _on_the_cpu(_empty_model(options, "ref_model", "ref_gguf_file"))


def weight_bytes(model: Any, *, in_4bit: bool) -> int:
    """Bytes of all parameters, each counted once; those that train are never quantized, nor is the head.

    Args:
        in_4bit: frozen linear layers are in bitsandbytes' 4 bits, with their scales.
    """
    head = unwrap_peft(model).get_output_embeddings()
    quantized = {
        id(module.weight)
        for module in model.modules()
        if in_4bit and isinstance(module, nn.Linear) and module is not head and not module.weight.requires_grad
    }
    return sum(_bytes_in_4bit(p.numel()) if id(p) in quantized else p.nbytes for p in model.parameters())


def _bytes_in_4bit(entries: int) -> int:
    return math.ceil(entries / _WEIGHTS_IN_A_BYTE) + _SCALE * math.ceil(entries / _BLOCK)


def _empty_model(options: ModelOptions, model_option: str, gguf_option: str) -> Any:
    name, gguf_file = require(options, model_option), getattr(options, gguf_option)
    check_exists("model", name)
    name = base_of(name) if adapters_folder(name) is not None else name
    source = {} if gguf_file is None else {"gguf_file": gguf_file}
    try:
        config: Any = AutoConfig.from_pretrained(name, trust_remote_code=options.trust_remote_code, **source)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the configuration of {model_option}, {name}, could not be read: {reason}") from error
    if getattr(config, "quantization_config", None) is not None and gguf_file is None:
        raise ValueError(f"{model_option} is {name}, whose checkpoint is quantized: its bytes are not known from here")
    building: dict[str, Any] = {"dtype": _dtype(options, config), "trust_remote_code": options.trust_remote_code}
    attention = options.attn_implementation
    if attention is not None:  # flash attention runs on GPUs alone; sdpa keeps what it keeps
        building["attn_implementation"] = "sdpa" if "flash" in attention else attention
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **building)
    return model.train()


def _on_the_cpu(model: Any) -> Any:
    """The model with fake tensors of the CPU, which models can be run on: the meta device is not enough for that."""
    with FAKE:
        model.to_empty(device="cpu")
        unwrap_peft(model).tie_weights()
    return model


def _dtype(options: ModelOptions, config: Any) -> torch.dtype:
    name = loaded_dtype(options)
    if name != "auto":
        return getattr(torch, name)
    stored = config.get_text_config().dtype or config.dtype
    return getattr(torch, stored) if isinstance(stored, str) else stored or torch.float32
