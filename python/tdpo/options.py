"""Options of the command line beside TDPOConfig, and how YAML files and flags become options."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class ModelOptions:
    """The models, and adapters to train instead of the whole policy."""

    model: str | None = _option(None, "Policy: a folder or a hub name. Needed.")
    ref_model: str | None = _option(None, "Reference: a folder or a hub name (default: the policy as it starts).")
    dtype: str = _option("auto", "Precision of the weights: auto (the checkpoint's), float32, bfloat16 or float16.")
    attn_implementation: str | None = _option(None, "Attention of the model: eager, sdpa, flash_attention_2, ...")
    trust_remote_code: bool = _option(False, "Allow models whose code comes with the checkpoint.")
    lora_r: int = _option(0, "Rank of LoRA adapters; 0 trains the whole policy.")
    lora_alpha: int = _option(16, "Scale of the adapters: their product is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = _option(0.0, "Dropout before the adapters.")
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Layers that get adapters (default: all linear layers but the head)."}
    )
    load_in_4bit: bool = _option(False, "Quantize the frozen weights to 4 bits (QLoRA; needs bitsandbytes).")
    merge_adapters: bool = _option(False, "Also save the policy with its adapters merged, in merged in output_dir.")

    def load(self, name: str) -> Any:
        """The causal language model `name`."""
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {"dtype": self.dtype, "trust_remote_code": self.trust_remote_code}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if self.load_in_4bit:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        return AutoModelForCausalLM.from_pretrained(name, **options)

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


@dataclass
class DataOptions:
    """The preference data."""

    dataset: str | None = _option(
        None, "Preferences: a JSON, JSONL, Parquet or CSV file, a folder of save_to_disk, or a hub name. Needed."
    )
    split: str = _option("train", "Split of a folder or hub data set.")
    eval_dataset: str | None = _option(None, "Preferences to evaluate on.")
    eval_split: str = _option("test", "Its split.")


def parse_options(command: str, kinds: list[type], description: str, arguments: list[str]) -> list[Any]:
    """Instances of the dataclasses `kinds` from `[config.yaml] [--flag value ...]`; flags win over the file.

    Raises:
        ValueError: the file is missing or no mapping, or holds a key that no option has (the nearest is suggested).
        SystemExit: bad flags, as argparse does.
    """
    parser = HfArgumentParser(kinds, prog=f"tdpo {command}", description=description)
    parser.usage = f"tdpo {command} [config.yaml] [--OPTION VALUE ...]"
    names = [spec.name for kind in kinds for spec in fields(kind) if spec.init]
    if arguments and not arguments[0].startswith("-"):
        path = Path(arguments.pop(0))
        if not path.is_file():
            raise ValueError(f"the configuration file {path} does not exist")
        given = yaml.safe_load(path.read_text()) or {}
        if not isinstance(given, dict):
            raise ValueError(f"the configuration file {path} holds no mapping of options to values")
        for key in given:
            _check_known(key, names, f"{path}: unknown option {key!r}")
        # What the file says stands in front of the flags, so that these win.
        arguments = [word for key, value in given.items() for word in _words(key, value)] + arguments
    for word in arguments:
        if word.startswith("--"):
            flag = word[2:].split("=")[0]
            known = [*names, "help", *(f"no_{name}" for name in names)]
            _check_known(flag.replace("-", "_"), known, f"unknown flag --{flag}")
    return list(parser.parse_args_into_dataclasses(arguments))


def _words(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{key}", yaml.safe_dump(value, default_flow_style=True).strip()]
    return [f"--{key}", str(value)]


def _check_known(name: str, names: list[str], message: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        raise ValueError(message + (f"; did you mean {near[0]!r}?" if near else ""))


def needed(options: Any, *names: str) -> None:
    """Raises ValueError naming the first of `names` that was not given."""
    for name in names:
        if getattr(options, name) is None:
            raise ValueError(f"{name} is missing; give --{name} or put it in the configuration file")
