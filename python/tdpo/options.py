"""The options: those of TDPO, those of transformers' TrainingArguments that matter to it, the models and the data.

Free of torch, so that `--help` is quick.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal


class Help(str):
    """An option's help text that carries its other metadata: parsers pass on the text alone."""

    identity: bool
    card: bool | Literal["always"]
    least: float | None


def option(
    default: Any,
    help: str,
    *,
    identity: bool = False,
    card: bool | Literal["always"] = False,
    least: float | None = None,
    choices: tuple[str, ...] | None = None,
) -> Any:
    """A dataclass field that is an option.

    Args:
        default: its default.
        help: text of its command-line flag.
        identity: it shapes what is trained: a run that resumes with another value is another run, and a model's README
            shows a value that differs from the default.
        card: the README shows such a value although the option has no `identity`; "always": even the default.
        least: the least number allowed.
        choices: the values allowed.
    """
    text = Help(help)
    text.identity, text.card, text.least = identity, card, least
    metadata = {"help": text} if choices is None else {"help": text, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


# The losses by name (`tdpo.loss.objectives`), each with the numbers of ObjectiveOptions that it uses.
USED_BY: dict[str, tuple[str, ...]] = {
    "tdpo2": ("beta", "alpha"),
    "tdpo1": ("beta",),
    "dpo": ("beta", "label_smoothing"),
    "ipo": ("beta",),
    "simpo": ("beta", "simpo_gamma"),
    "tis_dpo": ("beta", "alpha"),
}
# Those that read nothing of a reference.
REFERENCE_FREE = ("simpo",)


@dataclass
class ObjectiveOptions:
    """A loss by name, and the numbers in the formulas; each loss uses some of them (`USED_BY`)."""

    variant: str = option(
        "tdpo2",
        "Loss: tdpo2, tdpo1, dpo, ipo, simpo or tis_dpo.",
        identity=True,
        card="always",
        choices=tuple(USED_BY),
    )
    beta: float = option(0.1, "Strength of the KL constraint, > 0.", identity=True, card="always")
    alpha: float = option(0.5, "Weight of the KL difference in tdpo2 and tis_dpo, >= 0.", identity=True, card="always")
    label_smoothing: float = option(
        0.0, "Probability that a preference is flipped, in [0, 0.5); of dpo.", identity=True
    )
    simpo_gamma: float = option(0.5, "Target margin of simpo, >= 0.", identity=True)


@dataclass
class RowOptions:
    """What preference rows are and what becomes of them as tokens."""

    columns: dict[str, str | None] | str | None = option(  # noqa: RUF009
        None,
        "Columns under other names: prompt=question,chosen=best, a mapping in YAML, or JSON; an empty name (null) says "
        "that there is no such column.",
        identity=True,
    )
    pairing: str = option(
        "best_worst",
        "Pairs of a row's scored or ranked responses: best_worst, best_others (the best with each worse one), adjacent "
        "or all.",
        identity=True,
        choices=("best_worst", "best_others", "adjacent", "all"),
    )
    pairs_per_prompt: int | None = option(
        None, "Keep so many of a row's pairs, those of the largest differences (default: all).", identity=True, least=1
    )
    learned_turns: str = option(
        "assistant",
        "Turns of a response that are learned: the assistant's, the others being context, or all.",
        identity=True,
        choices=("assistant", "all"),
    )
    max_length: int = option(1024, "Maximum number of tokens of prompt and response together.", identity=True, least=2)
    max_prompt_length: int = option(
        512, "Maximum number of tokens of the prompt; its end is kept.", identity=True, least=1
    )
    overlong: str = option(
        "truncate",
        "What to do with rows over these lengths: truncate or drop.",
        identity=True,
        choices=("truncate", "drop"),
    )
    dataset_num_proc: int | None = option(
        None, "Number of processes that tokenize the data (default: this one).", least=1
    )


@dataclass
class TDPOOptions(ObjectiveOptions, RowOptions):
    """Options of the loss, of the reference, of the preference data and of the run; `TDPOConfig` checks them."""

    kl_direction: str | None = option(
        None,
        "KL that the loss sees: forward, of the reference from the policy, or reverse (default: the loss's own).",
        identity=True,
        choices=("forward", "reverse"),
    )
    token_columns: list[str] | None = option(  # noqa: RUF009
        None,
        "Numbers per token in tokenized data that your own objective reads: chosen_NAME and rejected_NAME.",
        identity=True,
    )
    learning_rate: float = option(
        None,  # until a trainer knows what trains
        "Initial learning rate (default: 1e-6, or 1e-5 where adapters are trained).",
        identity=True,
        card="always",
        least=0,
    )
    kl_warning: float = option(
        20.0,
        "Warn once when the mean KL of chosen responses, in nats, exceeds this while training; 0 never warns.",
        least=0,
    )
    router_aux_loss_coef: float | None = option(
        None,
        "Weight of the load-balancing loss of a mixture of experts (default: the model's own; 0: none).",
        identity=True,
    )
    logits_budget: int | None = option(None, "Bytes that logits and other temporaries of the loss may take.", least=1)
    disable_dropout: bool = option(
        True, "Disable the policy's dropout, which the reference doesn't have either.", identity=True
    )

    padding_free: bool = option(
        False, "Pack the sequences of a batch into one row without padding; needs a model that isolates them."
    )

    shared_prompts: str = option(
        "auto",
        "Run a pair's prompt through the models once: auto (where a check shows that they allow it), always or never.",
        choices=("auto", "always", "never"),
    )

    precompute_reference: bool = option(
        False,
        "Run the reference once, cache its hidden states on disk and keep only its head in memory.",
        identity=True,
    )
    reference_cache: str | None = option(
        None, "Folder of the reference's hidden states (default: reference-cache in output_dir)."
    )
    reference_dtype: str = option(
        "bfloat16",
        "Precision of the cached hidden states: bfloat16, float16, float32 or, at half the size, float8.",
        identity=True,
        choices=("bfloat16", "float16", "float32", "float8"),
    )

    audit: str = option(
        "first",
        "Compare the loss of two pairs with plain arithmetic before the first step (first), or never.",
        choices=("first", "never"),
    )
    eval_samples: int = option(
        0,
        "Number of evaluation prompts that policy and reference continue, side by side, at every evaluation.",
        least=0,
    )
    eval_sample_tokens: int = option(64, "Maximum number of tokens of such a continuation.", least=1)

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
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    attn_implementation: str | None = option(None, "Attention of the model: eager, sdpa, flash_attention_2, ...")
    tp_plan: str | None = option(None, "Split every layer over the processes: auto, by transformers' plan for it.")
    trust_remote_code: bool = option(False, "Allow models whose code comes with the checkpoint.")
    lora_r: int = option(0, "Rank of LoRA adapters; 0 trains the whole policy.", least=0)
    lora_alpha: int = option(16, "Scale of the adapters: their product is multiplied by lora_alpha / lora_r.", least=1)
    lora_dropout: float = option(0.0, "Dropout before the adapters, in [0, 1).", least=0)
    lora_target_modules: list[str] | None = option(  # noqa: RUF009
        None, "Layers that get adapters (default: all linear layers but the head)."
    )
    load_in_4bit: bool = option(False, "Quantize the frozen weights to 4 bits (QLoRA; needs bitsandbytes).")
    merge_adapters: bool = option(False, "Also save the policy with its adapters merged, to merged in output_dir.")


@dataclass
class DataOptions:
    """The preference data."""

    dataset: str | None = option(
        None, "Preferences: JSON, JSONL, Parquet, CSV or TSV files, a folder of save_to_disk, or a hub name. Required."
    )
    split: str = option("train", "Split, or a slice of one, such as train[:1000].")
    eval_dataset: str | None = option(None, "Preferences to evaluate on.")
    eval_split: str = option("test", "Split of eval_dataset, or a slice of one.")
    streaming: bool = option(
        False,
        "Read rows while training instead of tokenizing all of them first: for data that do not fit; needs max_steps.",
    )


@dataclass
class ShowOptions(DataOptions):
    """The preference data, and how much of it `tdpo data` shows."""

    show_rows: int = option(3, "Number of pairs to show token by token.", least=0)
    show_tokens: int = option(
        60, "Tokens to show of a prompt or a response; of longer ones the middle is left out.", least=2
    )


@dataclass
class MemoryOptions(DataOptions):
    """The preference data, which `tdpo memory` does not read, and the batch and the GPU that it counts for."""

    prompt_tokens: int | None = option(None, "Tokens of a prompt (default: max_prompt_length).", least=1)
    response_tokens: int | None = option(
        None, "Tokens of a response (default: what max_length leaves beside the prompt).", least=1
    )
    gpu_memory: str | None = option(
        None, "Memory of the GPU that it is for: 80GB, 40GiB, ... (default: this machine's GPU, or its CPU)."
    )
    json: bool = option(False, "Print JSON instead of a table.")


def require(options: ModelOptions | DataOptions, name: str) -> Any:
    """The value of an option.

    Raises:
        ValueError: it was not given.
    """
    value = getattr(options, name)
    if value is None:
        raise ValueError(f"{name} is missing; give --{name} or put it in the configuration file")
    return value


@dataclass
class CommonOptions:
    """What most runs set of transformers' options, for `--help`: loading transformers' own takes seconds."""

    output_dir: str = option("trainer_output", "Folder of checkpoints, logs and the trained model.")
    num_train_epochs: float = option(3.0, "Number of passes over the data.", card=True)
    max_steps: int = option(-1, "Number of optimizer steps; above 0 it overrides num_train_epochs.", card=True)
    per_device_train_batch_size: int = option(8, "Pairs in a batch of a device.", identity=True)
    per_device_eval_batch_size: int = option(8, "Pairs in an evaluation batch of a device.")
    gradient_accumulation_steps: int = option(1, "Batches of every optimizer step.", identity=True)
    optim: str = option(
        "adamw_torch_fused", "Optimizer: adamw_torch, rmsprop, adafactor, ...", identity=True, card="always"
    )
    lr_scheduler_type: str = option(
        "linear", "Schedule of the learning rate: linear, cosine, constant, ...", identity=True
    )
    warmup_steps: float = option(
        0, "Steps in which the learning rate rises; below 1, a share of all steps.", identity=True
    )
    weight_decay: float = option(0.0, "Weight decay.", identity=True)
    max_grad_norm: float = option(1.0, "Largest norm of the gradient.", identity=True)
    bf16: bool = option(False, "Compute in bfloat16; weights keep their precision (see dtype).", identity=True)
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass instead of keeping them.")
    eval_strategy: str = option("no", "When to evaluate while training: no, steps or epoch.")
    eval_steps: float | None = option(None, "Steps between evaluations (default: logging_steps).")
    save_strategy: str = option("steps", "When to write checkpoints: no, steps, epoch or best.")
    save_steps: float = option(500, "Steps between checkpoints; below 1, a share of all steps.")
    save_total_limit: int | None = option(None, "Number of checkpoints to keep.")
    train_sampling_strategy: str = option(
        "random",
        "Order of the data: random (of a stream, in a buffer of 1000 rows), sequential or group_by_length.",
        identity=True,
    )
    report_to: str = option("none", "Where to send logs: none, tensorboard, wandb, ...")
    seed: int = option(42, "Seed of the data's order, of dropout and of new adapters.", identity=True)
    use_cpu: bool = option(False, "Train on the CPU although there is an accelerator.")


@dataclass
class RareOptions:
    """Others of transformers' options that identify a run; transformers documents them."""

    optim_args: str | None = option(None, "Arguments of the optimizer.", identity=True)
    optim_target_modules: str | None = option(None, "Layers of GaLore and its like.", identity=True)
    lr_scheduler_kwargs: str | None = option(None, "Arguments of the schedule.", identity=True)
    adam_beta1: float = option(0.9, "Decay of Adam's first moment.", identity=True)
    adam_beta2: float = option(0.999, "Decay of Adam's second moment.", identity=True)
    adam_epsilon: float = option(1e-8, "Adam's epsilon.", identity=True)
    neftune_noise_alpha: float | None = option(None, "Noise on embeddings.", identity=True)
    data_seed: int | None = option(None, "Seed of the data's order alone.", identity=True)
    fp16: bool = option(False, "Compute in float16.", identity=True)


def identity_options() -> list[str]:
    """The options that identify a run.

    Not among them: its length (max_steps, num_train_epochs), so that a run may be extended or cut short, and what is
    logged, saved and evaluated.
    """
    return [name for name, text in _texts() if text.identity]


def card_options() -> dict[str, bool | Literal["always"]]:
    """The options that a model's README shows; the value is "always" for those it shows at their defaults too."""
    return {name: text.card for name, text in _texts() if text.card or text.identity}


def _texts() -> list[tuple[str, Help]]:
    groups = (TDPOOptions, CommonOptions, RareOptions)
    return [(item.name, item.metadata["help"]) for group in groups for item in fields(group)]
