"""Options of transformers that make no run, or would be wrong here: refused by name when the options are made.

Free of torch and transformers.
"""

from __future__ import annotations

from typing import Any

from .plain import checks

_COUNTS = {  # integers, by the least
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
}
_POSITIVE = {  # numbers, and what does what 0 might be meant for
    "logging_steps": "logging_strategy no",
    "eval_steps": "eval_strategy no",
    "save_steps": "save_strategy no",
}
_NOT_NEGATIVE = ("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay")
_UNSET = -1  # of max_steps
_FULL_EVAL = ("bf16_full_eval", "fp16_full_eval")


def check_numbers(args: Any) -> None:
    """Refuses numbers with which nothing could be trained, or which are taken for something else.

    Args:
        args: TrainingArguments before their own checks.

    Raises:
        TypeError, ValueError: the message names the option.
    """
    for name, least in _COUNTS.items():
        if getattr(args, name) is not None:
            checks.integer(name, getattr(args, name), least=least)
    for name in _NOT_NEGATIVE:
        if getattr(args, name) is not None:
            checks.real(name, getattr(args, name), least=0)
    for name, instead in _POSITIVE.items():
        value = getattr(args, name)
        if value is not None and checks.real(name, value) <= 0:
            raise ValueError(f"{name} is {value}; it must be positive ({instead} turns it off)")
    if checks.integer("max_steps", args.max_steps) != _UNSET and args.max_steps < 1:
        raise ValueError(f"max_steps is {args.max_steps}; it must be positive, or left out for num_train_epochs")
    if args.max_steps == _UNSET:
        checks.real("num_train_epochs", args.num_train_epochs, above=0)


def check_full_eval(args: Any) -> None:
    """Refuses to cast the policy alone, and for good, when it is evaluated.

    Raises:
        ValueError: an option asks for it.
    """
    for name in _FULL_EVAL:
        if getattr(args, name):
            raise ValueError(
                f"{name} is True; it would cast the policy for good, and not its reference: set {name[:4]} instead, in "
                "which both are evaluated as they are trained, or load both models in that precision"
            )


def check_batches(accelerator_config: Any) -> None:
    """Refuses that one process makes the batches of all and cuts them.

    Args:
        accelerator_config: of TrainingArguments after their own checks.

    Raises:
        ValueError: it asks for that.
    """
    if accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config has dispatch_batches True, which cuts batches by rows, and with them the response "
            "tokens of several rows: leave it out, so that every process makes its own"
        )
