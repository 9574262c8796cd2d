"""Options of the command line beside TDPOConfig, and how YAML files and flags become options.

Importing this loads no torch, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from ..files import read_json
from ..models.gguf import load_gguf_model, load_gguf_tokenizer
from ..options import option
from .help import HELP_FLAGS, print_help, usage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config import TDPOConfig


@dataclass
class ModelOptions:
    """The models, and adapters to train instead of the whole policy."""

    model: str | None = option(None, "Policy: a folder or a hub name. Required.")
    gguf_file: str | None = option(None, "File in the policy's folder to load, dequantized; its tokenizer is used too.")
    ref_model: str | None = option(None, "Reference: a folder or a hub name (default: the policy as it starts).")
    ref_gguf_file: str | None = option(None, "File in the reference's folder to load, dequantized.")
    dtype: str = option(
        "auto",
        "Precision of the weights: auto (float32, or the checkpoint's where adapters are trained), float32, bfloat16 "
        "or float16.",
    )
    attn_implementation: str | None = option(None, "Attention of the model: eager, sdpa, flash_attention_2, ...")
    tp_plan: str | None = option(None, "Split every layer over the processes: auto, by transformers' plan for it.")
    trust_remote_code: bool = option(False, "Allow models whose code comes with the checkpoint.")
    lora_r: int = option(0, "Rank of LoRA adapters; 0 trains the whole policy.")
    lora_alpha: int = option(16, "Scale of the adapters: their product is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = option(  # noqa: RUF009
        None, "Layers that get adapters (default: all linear layers but the head)."
    )
    load_in_4bit: bool = option(False, "Quantize the frozen weights to 4 bits (QLoRA; needs bitsandbytes).")
    merge_adapters: bool = option(False, "Also save the policy with its adapters merged, to merged in output_dir.")

    @property
    def loaded_dtype(self) -> str:
        """Float32 for weights that may be trained: most steps are smaller than the spacing of bfloat16 numbers.

        And for the reference beside them, which must compute as the policy does to differ from it by nothing at first.
        """
        frozen = self.lora_r > 0 or self.load_in_4bit
        return self.dtype if self.dtype != "auto" or frozen else "float32"

    def policy(self) -> Any:
        """The causal language model to train or to evaluate."""
        return self._load("model", "gguf_file")

    def reference(self) -> Any:
        """The frozen reference, or None where no model is named for it.

        Raises:
            ValueError: `ref_gguf_file` is given without the folder that holds it.
        """
        if self.ref_model is not None:
            return self._load("ref_model", "ref_gguf_file")
        if self.ref_gguf_file is not None:
            raise ValueError(f"ref_gguf_file is {self.ref_gguf_file}, but its folder, ref_model, is missing")
        return None

    def _load(self, model_option: str, gguf_option: str) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        name, gguf_file = require(self, model_option), getattr(self, gguf_option)
        options: dict[str, Any] = {"dtype": self.loaded_dtype, "trust_remote_code": self.trust_remote_code}
        for option_name in ("attn_implementation", "tp_plan"):
            if getattr(self, option_name) is not None:
                options[option_name] = getattr(self, option_name)
        if gguf_file is not None:
            self._check_dense(gguf_option)
            return _loaded("model", load_gguf_model, name, gguf_file=gguf_file, **options)
        if self.load_in_4bit:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        return _loaded("model", AutoModelForCausalLM.from_pretrained, name, **options)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        from transformers import AutoTokenizer

        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.gguf_file is not None:
            return _loaded("tokenizer", load_gguf_tokenizer, self.model, gguf_file=self.gguf_file, **options)
        return _loaded("tokenizer", AutoTokenizer.from_pretrained, self.model, **options)

    def _check_dense(self, gguf_option: str) -> None:
        """Refuses, beside a GGUF file, what loads the weights in any other form than whole and dense."""
        from transformers.integrations import is_deepspeed_zero3_enabled

        given = f"{gguf_option} is {getattr(self, gguf_option)}"
        if self.load_in_4bit:
            raise ValueError(f"load_in_4bit is True, but {given}, whose weights are dequantized: leave one of them out")
        if self.tp_plan is not None:
            raise ValueError(f"tp_plan is {self.tp_plan}, but {given}, which is loaded whole: leave one of them out")
        if is_deepspeed_zero3_enabled():
            raise ValueError(f"{given}, which ZeRO-3 can't partition: load and save it first, then train that folder")

    def adapters(self) -> Any:
        """The peft config that these options name, or None."""
        if self.lora_r == 0:
            return None
        from peft import LoraConfig

        return LoraConfig(
            task_type="CAUSAL_LM",
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_target_modules or "all-linear",
        )


def _loaded(what: str, load: Callable[..., Any], name: str | None, **options: Any) -> Any:
    """What `load` reads from a folder or a hub.

    Raises:
        ValueError: it is missing or damaged; the message names it.
    """
    import torch

    from ..runs.checkpoints import MANIFEST, check

    if name is not None and Path(name, MANIFEST).is_file():
        check(name)
    try:
        return load(name, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # safetensors, tokenizers and pickle have errors of their own
        if not Path(name or "").exists() and _looks_like_path(name or ""):
            raise ValueError(f"the {what} {name} does not exist") from error
        reason = " ".join(str(error).split()) or type(error).__name__
        if not Path(name or "").exists():
            reason = f"there is no such folder here, and a hub gave none: {reason}"
        source = _unreadable_file(name) or Path(name or "", options.get("gguf_file", ""))
        raise ValueError(f"the {what} {source} could not be loaded: {reason}") from error


def _looks_like_path(name: str) -> bool:
    """Whether a name can be no hub's, which are NAME or OWNER/NAME."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1


def _unreadable_file(folder: str | None) -> Path | None:
    """The first file in a folder that can't be read for what it is: the errors of its loader may not name it."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(Path(folder or "").glob("*")):
        try:
            if path.suffix == ".json":
                read_json(path)
            if path.suffix == ".safetensors":
                safe_open(path, framework="pt").keys()
        except (OSError, ValueError, SafetensorError):
            return path
    return None


@dataclass
class DataOptions:
    """The preference data."""

    dataset: str | None = option(
        None, "Preferences: a JSON, JSONL, Parquet or CSV file, a folder of save_to_disk, or a hub name. Required."
    )
    split: str = option("train", "Split of a folder or hub dataset.")
    eval_dataset: str | None = option(None, "Preferences to evaluate on.")
    eval_split: str = option("test", "Split of eval_dataset.")


class Options(NamedTuple):
    """All options of a command."""

    models: ModelOptions
    data: DataOptions
    training: TDPOConfig


def parse_options(command: str, description: str, arguments: list[str]) -> Options:
    """The options of `tdpo command` from `[config.yaml] [--flag value ...]`; flags override the file.

    Raises:
        ValueError: the file is missing or holds no mapping in YAML, or a key is no option (the nearest is suggested).
        SystemExit: bad flags, as argparse does.
    """
    for flag, everything in HELP_FLAGS.items():
        if flag in arguments:
            print_help(command, description, everything=everything)
            raise SystemExit(0)
    from transformers import HfArgumentParser

    from ..config import TDPOConfig

    option_classes = (ModelOptions, DataOptions, TDPOConfig)
    parser = HfArgumentParser(option_classes, prog=f"tdpo {command}", usage=usage(command), description=description)
    hints = {name: kind for options in option_classes for name, kind in get_type_hints(options).items()}
    kinds = {item.name: hints[item.name] for options in option_classes for item in fields(options) if item.init}
    if arguments and not arguments[0].startswith("-"):
        path, *arguments = arguments
        parser.set_defaults(**_options_of_file(Path(path), kinds))
    known = [*kinds, *(f"no_{name}" for name in kinds)]
    for flag in arguments:
        if flag.startswith("--"):
            flag = flag[2:].split("=")[0]
            _check_known(flag.replace("-", "_"), known, f"unknown flag --{flag}")
    return Options._make(parser.parse_args_into_dataclasses(arguments, look_for_args_file=False))


def _options_of_file(path: Path, kinds: dict[str, Any]) -> dict[str, Any]:
    """The options of a YAML file, as defaults that flags override."""
    if not path.is_file():
        raise ValueError(f"the configuration file {path} does not exist")
    try:
        options = yaml.safe_load(path.read_bytes()) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the configuration file {path} is not valid YAML: {reason}") from error
    if not isinstance(options, dict):
        raise ValueError(f"the configuration file {path} holds no mapping of options to values")
    for name in options:
        _check_known(name, list(kinds), f"{path}: unknown option {name!r}")
    return {
        name: _default(f"{path}: {name}", kinds[name], value) for name, value in options.items() if value is not None
    }


def _default(name: str, kind: Any, value: Any) -> Any:
    """A value of a YAML file for an option of type `kind`: lists and mappings as they are, what a flag takes as text.

    argparse converts text that is a default as it does a flag's.
    """
    members = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    types = [member for member in (get_origin(member) or member for member in members) if isinstance(member, type)]
    choices = [choice.value for enumeration in types if issubclass(enumeration, Enum) for choice in enumeration]
    if isinstance(value, bool) and bool not in types:  # YAML takes `no` and `off` for a boolean
        value = "no" if not value and "no" in choices else str(value).lower()
    if choices and value not in choices:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(choices)}")
    if list in types and str not in types and not isinstance(value, list):
        value = [value]
    if isinstance(value, (list, dict)) and type(value) not in types:
        raise ValueError(f"{name} is {value!r}, a {type(value).__name__}, which it does not take")
    return value if isinstance(value, (list, dict, bool)) else str(value)


def _check_known(name: str, names: list[str], message: str) -> None:
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        raise ValueError(message + (f"; did you mean {nearest[0]!r}?" if nearest else ""))


def require(options: ModelOptions | DataOptions, name: str) -> Any:
    """The value of an option.

    Raises:
        ValueError: it was not given.
    """
    value = getattr(options, name)
    if value is None:
        raise ValueError(f"{name} is missing; give --{name} or put it in the configuration file")
    return value
