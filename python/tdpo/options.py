"""The options of the commands: the trainer's own, the models and the data. Free of torch, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the help text of its command-line flag."""
    return field(default=default, metadata={"help": help})


@dataclass
class TDPOOptions:
    """Options of the loss, of the reference, of the preference data and of the run; `TDPOConfig` checks them."""

    beta: float = option(0.1, "Strength of the KL constraint, > 0.")
    alpha: float = option(0.5, "Weight of the KL difference in tdpo2 and tis_dpo, >= 0.")
    variant: str = option("tdpo2", "Loss: tdpo2, tdpo1, dpo, ipo, simpo or tis_dpo.")
    label_smoothing: float = option(0.0, "Probability that a preference is flipped, in [0, 0.5); of dpo.")
    simpo_gamma: float = option(0.5, "Target margin of simpo, >= 0.")
    kl_direction: str | None = option(
        None, "KL that the loss sees: forward, of the reference from the policy, or reverse (default: the loss's own)."
    )
    token_columns: list[str] | None = option(  # noqa: RUF009
        None, "Numbers per token in tokenized data that your own objective reads: chosen_NAME and rejected_NAME."
    )
    learning_rate: float | None = option(
        None, "Initial learning rate (default: 1e-6, or 1e-5 where adapters are trained)."
    )
    kl_warning: float = option(
        20.0, "Warn once when the mean KL of chosen responses, in nats, exceeds this while training; 0 never warns."
    )
    router_aux_loss_coef: float | None = option(
        None, "Weight of the load-balancing loss of a mixture of experts (default: the model's own; 0: none)."
    )
    logits_budget: int | None = option(None, "Bytes that logits and other temporaries of the loss may take.")
    disable_dropout: bool = option(True, "Disable the policy's dropout, which the reference doesn't have either.")

    max_length: int = option(1024, "Maximum number of tokens of prompt and response together.")
    max_prompt_length: int = option(512, "Maximum number of tokens of the prompt; its end is kept.")
    overlong: str = option("truncate", "What to do with rows over these lengths: truncate or drop.")
    dataset_num_proc: int | None = option(None, "Number of processes that tokenize the data (default: this one).")
    padding_free: bool = option(
        False, "Pack the sequences of a batch into one row without padding; needs a model that isolates them."
    )

    shared_prompts: str = option(
        "auto",
        "Run a pair's prompt through the models once: auto (where a check shows that they allow it), always or never.",
    )

    precompute_reference: bool = option(
        False, "Run the reference once, cache its hidden states on disk and keep only its head in memory."
    )
    reference_cache: str | None = option(
        None, "Folder of the reference's hidden states (default: reference-cache in output_dir)."
    )
    reference_dtype: str = option(
        "bfloat16", "Precision of the cached hidden states: bfloat16, float16, float32 or, at half the size, float8."
    )

    eval_samples: int = option(
        0, "Number of evaluation prompts that policy and reference continue, side by side, at every evaluation."
    )
    eval_sample_tokens: int = option(64, "Maximum number of tokens of such a continuation.")

    logging_steps: float = option(10, "Log every so many steps; below 1, a share of all steps.")
    resume_anyway: bool = option(
        False, "Resume from a checkpoint although options or data differ from those that it was trained with."
    )
    remove_unused_columns: bool = option(False, "Leave False: the collator reads columns that no model takes.")


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


@dataclass
class DataOptions:
    """The preference data."""

    dataset: str | None = option(
        None, "Preferences: a JSON, JSONL, Parquet or CSV file, a folder of save_to_disk, or a hub name. Required."
    )
    split: str = option("train", "Split of a folder or hub dataset.")
    eval_dataset: str | None = option(None, "Preferences to evaluate on.")
    eval_split: str = option("test", "Split of eval_dataset.")


def require(options: ModelOptions | DataOptions, name: str) -> Any:
    """The value of an option.

    Raises:
        ValueError: it was not given.
    """
    value = getattr(options, name)
    if value is None:
        raise ValueError(f"{name} is missing; give --{name} or put it in the configuration file")
    return value
