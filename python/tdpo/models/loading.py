"""Models, tokenizers and adapters as the options name them: from folders, hubs and GGUF files.

Importing this loads neither torch nor transformers.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..extras import MissingExtra, require_package
from ..files import MANIFEST, check_manifest, read_json
from ..option_checks import check_dense, check_precision_of_merged
from ..options import ModelOptions, require
from .names import check_exists, check_gguf_exists, is_here

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def load_policy(options: ModelOptions) -> Any:
    """The causal language model to train or to evaluate.

    Adapters in the folder `model` are trained further; where `lora_r` asks for new ones, they are merged into the
    weights.
    """
    merges = merges_adapters(options)
    check_precision_of_merged(options, merges=merges)
    model = _load_model(options, "model", "gguf_file")
    if not merges:
        return model
    logger.warning("the adapters in %s are merged into the weights; lora_r adds new ones", options.model)
    from .merging import merge_adapters

    return merge_adapters(model)


def merges_adapters(options: ModelOptions) -> bool:
    """Whether the policy's own adapters are merged into its weights, to make room for new ones."""
    return options.lora_r > 0 and adapters_folder(require(options, "model")) is not None


def trains_adapters(options: ModelOptions) -> bool:
    """Whether adapters are trained: new ones or the policy's own."""
    own = options.model is not None and adapters_folder(options.model) is not None
    return options.lora_r > 0 or own


def load_adapted_model(options: ModelOptions) -> Any:
    """The model that the adapters to be trained are added to, in full precision."""
    options = replace(options, load_in_4bit=False, tp_plan=None)
    if options.lora_r > 0:
        return load_policy(options)
    return _load_weights(options, base_of(require(options, "model")), "gguf_file")


def load_reference(options: ModelOptions) -> Any:
    """The frozen reference, or None where no model is named for it.

    Raises:
        ValueError: `ref_gguf_file` is given without the folder that holds it.
    """
    if options.ref_model is not None:
        return _load_model(options, "ref_model", "ref_gguf_file")
    if options.ref_gguf_file is not None:
        raise ValueError(f"ref_gguf_file is {options.ref_gguf_file}, but its folder, ref_model, is missing")
    return None


def load_tokenizer(options: ModelOptions) -> PreTrainedTokenizerBase:
    """The policy's tokenizer."""
    from transformers import AutoTokenizer

    name, trusted = require(options, "model"), {"trust_remote_code": options.trust_remote_code}
    if adapters_folder(name) and not Path(name, "tokenizer_config.json").is_file():
        name = base_of(name)
    if options.gguf_file is not None and not adapters_folder(name):  # which have a tokenizer beside them
        return _loaded("tokenizer", load_gguf_tokenizer, name, gguf_file=options.gguf_file, **trusted)
    return _loaded("tokenizer", AutoTokenizer.from_pretrained, name, **trusted)


def lora_config(options: ModelOptions) -> Any:
    """The peft config of the adapters that the options name, or None."""
    if options.lora_r == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(
        task_type="CAUSAL_LM",
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=options.lora_dropout,
        target_modules=_target_modules(options.lora_target_modules),
    )


def _target_modules(names: list[str] | None) -> list[str] | str:
    """Names of layers; or a text, as peft has it for all linear layers and for a pattern of names."""
    if names is None:
        return "all-linear"
    pattern = len(names) == 1 and (names[0] == "all-linear" or re.search(r"[*+?^$|()\[\]\\]", names[0]))
    return names[0] if pattern else names


def loaded_dtype(options: ModelOptions) -> str:
    """Float32 for weights that may be trained: most steps are smaller than the spacing of bfloat16 numbers.

    The reference gets the same, so that at first it equals the policy exactly.
    """
    frozen = trains_adapters(options) or options.load_in_4bit
    return options.dtype if options.dtype != "auto" or frozen else "float32"


def keep_quantized_weights_unpacked(model: Any) -> None:
    """Keeps bitsandbytes from packing 4-bit weights on a CPU when a model is evaluated.

    Gradients through packed weights are wrong in bitsandbytes 0.50 (by a third, seen on a small Llama).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _load_model(options: ModelOptions, model_option: str, gguf_option: str) -> Any:
    """A model, and its adapters around it where the folder holds adapters."""
    name = require(options, model_option)
    folder = adapters_folder(name)
    if folder is None:
        return _load_weights(options, name, gguf_option)
    from peft import PeftModel

    base = _load_weights(options, base_of(name), gguf_option)
    trained = model_option == "model"
    return _loaded("adapters", lambda path: PeftModel.from_pretrained(base, path, is_trainable=trained), name)


def adapters_folder(name: str) -> Path | None:
    """The folder of a hub's cache or of the disk that holds the adapters of this name; None where it names a model."""
    if is_here(name):
        return Path(name) if Path(name, "adapter_config.json").is_file() else None
    from transformers.utils.peft_utils import find_adapter_config_file

    config = find_adapter_config_file(name)
    return None if config is None else Path(config).parent


def base_of(name: str) -> str:
    """The model that adapters were trained on.

    Raises:
        ValueError: their configuration does not name it.
    """
    base = read_json(Path(adapters_folder(name) or name, "adapter_config.json")).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"adapter_config.json of the adapters {name} does not name the model that they were trained on"
        )
    return base


def _load_weights(options: ModelOptions, name: str, gguf_option: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    gguf_file = getattr(options, gguf_option)
    loading: dict[str, Any] = {"dtype": loaded_dtype(options), "trust_remote_code": options.trust_remote_code}
    for option_name in ("attn_implementation", "tp_plan"):
        if getattr(options, option_name) is not None:
            loading[option_name] = getattr(options, option_name)
    if gguf_file is not None:
        _check_dense(options, gguf_option)
        return _loaded("model", load_gguf_model, name, gguf_file=gguf_file, **loading)
    if options.load_in_4bit:
        from transformers import BitsAndBytesConfig

        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    return _loaded("model", AutoModelForCausalLM.from_pretrained, name, **loading)


def _check_dense(options: ModelOptions, gguf_option: str) -> None:
    """Refuses options that contradict a GGUF file's weights, and an engine that does."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    check_dense(options, gguf_option)
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"{gguf_option} is {getattr(options, gguf_option)}, which ZeRO-3 can't partition: load and save it first, "
            "then train that folder"
        )


def _loaded(what: str, load: Callable[..., Any], name: str, **options: Any) -> Any:
    """Calls `load` on a folder or a hub's name.

    Raises:
        ValueError: it is missing or damaged; the message names it.
    """
    import torch

    folder = Path(name)
    check_exists(what, name)
    if (folder / MANIFEST).is_file():
        check_manifest(folder)
    try:
        return load(name, **options)
    except (MemoryError, torch.OutOfMemoryError, MissingExtra):
        raise
    except Exception as error:  # safetensors, tokenizers and pickle have errors of their own
        reason = " ".join(str(error).split()) or type(error).__name__
        if not folder.exists():
            reason = f"there is no such folder here, and a hub gave none: {reason}"
        source = _unreadable_file(folder) or folder / options.get("gguf_file", "")
        raise ValueError(f"the {what} {source} could not be loaded: {reason}") from error


def _unreadable_file(folder: Path) -> Path | None:
    """The first file in a folder that can't be read for what it is: the errors of its loader may not name it."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*")):
        try:
            if path.suffix == ".json":
                read_json(path)
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt").keys()
        except (OSError, ValueError, SafetensorError):
            return path
    return None


# ---- GGUF files, whose weights llama.cpp and others quantize: loaded dequantized, as any other checkpoint ----


def load_gguf_model(folder: str | Path, gguf_file: str, **options: Any) -> PreTrainedModel:
    """The causal language model of a GGUF file, with dense weights that can be trained and saved.

    Args:
        folder: the folder that holds the file, or a hub name.
        gguf_file: its name.
        options: as `from_pretrained` takes them; without a `dtype` the weights are float32.

    Raises:
        ValueError: the file is missing.
        ImportError: the package `gguf` is.
    """
    check_gguf_exists(folder, "gguf_file", gguf_file)
    require_package("gguf")
    from transformers import AutoModelForCausalLM, GgufConfig

    # Otherwise weights may stay in the file's quantized blocks, which can be neither trained nor saved.
    dense = GgufConfig(dequantize=True)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, quantization_config=dense, **options)
    model.gguf_file = gguf_file  # the config names the folder alone, which may hold several
    return model


def load_gguf_tokenizer(folder: str | Path, gguf_file: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template.

    Raises:
        ValueError: the file is missing.
        ImportError: the package `gguf` is.
    """
    check_gguf_exists(folder, "gguf_file", gguf_file)
    require_package("gguf")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, **options)
