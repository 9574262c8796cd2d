"""The help pages of the commands that take the trainer's options. Free of torch unless all options are asked for."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any

from ..options import DataOptions, ModelOptions, TDPOOptions

HELP_FLAGS = {"-h": False, "--help": False, "--help-all": True}
# What most runs set of transformers' options. The defaults are stated here, where loading transformers takes seconds.
COMMON: dict[str, tuple[Any, str]] = {
    "output_dir": (None, "Folder of checkpoints, logs and the trained model."),
    "num_train_epochs": (3.0, "Number of passes over the data."),
    "max_steps": (-1, "Number of optimizer steps; above 0 it overrides num_train_epochs."),
    "per_device_train_batch_size": (8, "Pairs in a batch of a device."),
    "per_device_eval_batch_size": (8, "Pairs in an evaluation batch of a device."),
    "gradient_accumulation_steps": (1, "Batches of every optimizer step."),
    "optim": ("adamw_torch_fused", "Optimizer: adamw_torch, rmsprop, adafactor, ..."),
    "lr_scheduler_type": ("linear", "Schedule of the learning rate: linear, cosine, constant, ..."),
    "warmup_steps": (0, "Steps in which the learning rate rises; below 1, a share of all steps."),
    "weight_decay": (0.0, "Weight decay."),
    "max_grad_norm": (1.0, "Largest norm of the gradient."),
    "bf16": (False, "Compute in bfloat16; weights keep their precision (see dtype)."),
    "gradient_checkpointing": (False, "Recompute activations in the backward pass instead of keeping them."),
    "eval_strategy": ("no", "When to evaluate while training: no, steps or epoch."),
    "eval_steps": (None, "Steps between evaluations (default: logging_steps)."),
    "save_strategy": ("steps", "When to write checkpoints: no, steps, epoch or best."),
    "save_steps": (500, "Steps between checkpoints; below 1, a share of all steps."),
    "save_total_limit": (None, "Number of checkpoints to keep."),
    "train_sampling_strategy": ("random", "Order of the data: random, sequential or group_by_length."),
    "report_to": ("none", "Where to send logs: none, tensorboard, wandb, ..."),
    "seed": (42, "Seed of the data's order, of dropout and of new adapters."),
    "use_cpu": (False, "Train on the CPU although there is an accelerator."),
}


def usage(command: str) -> str:
    return f"tdpo {command} [config.yaml] [--OPTION VALUE ...]"


def print_help(command: str, description: str, *, everything: bool) -> None:
    """Prints our options, then the most used of transformers', or `everything` that transformers takes."""
    print(f"usage: {usage(command)}\n\n{textwrap.fill(description, 110)}\n")
    print("Options are flags, or keys of a YAML file; flags override the file.")
    groups = {"Models": ModelOptions, "Data": DataOptions, "TDPO and the run": TDPOOptions}
    for title, options in groups.items():
        print(f"\n{title}:")
        for field in fields(options):
            _print_option(field.name, _default(field), field.metadata["help"])
    if not everything:
        print("\nOften set, of transformers.TrainingArguments:")
        for name, (default, text) in COMMON.items():
            _print_option(name, default, text)
        print(f"\n`tdpo {command} --help-all` lists every option of transformers.TrainingArguments too.")
        return
    from transformers import TrainingArguments

    print("\ntransformers.TrainingArguments:")
    ours = {field.name for field in fields(TDPOOptions)}
    for field in fields(TrainingArguments):
        if field.init and field.name not in ours:
            _print_option(field.name, _default(field), str(field.metadata.get("help", "")))


def _default(field: Field) -> Any:
    return None if field.default is MISSING else field.default


def _print_option(name: str, default: Any, text: str) -> None:
    shown = getattr(default, "value", default)  # of an enumeration
    if shown not in (None, "") and "(default" not in text:
        text = f"{text} (default: {shown})"
    text = textwrap.fill(" ".join(text.split()), 118, initial_indent=" " * 32, subsequent_indent=" " * 32)
    flag = f"  --{name}"
    print(f"{flag:<32s}{text[32:]}" if len(flag) < 32 else f"{flag}\n{text}")
