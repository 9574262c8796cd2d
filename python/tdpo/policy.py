"""Before a trainer is built: arguments checked, data tokenized, the policy given its adapters and freed of dropout."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, set_seed

from .config import TDPOConfig
from .data.stream import is_stream
from .models.adapters import has_adapters
from .models.checks import check_models, check_policy
from .models.noise import disable_dropout
from .option_checks import check_needed, check_stream_options
from .precision import autocast, check_attention
from .refusals import use_one_gpu

_NEED_LOGITS = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
_LEARNING_RATE, _LEARNING_RATE_OF_ADAPTERS = 1e-6, 1e-5  # as in TRL's examples


def check_trainer_arguments(
    model: Any,
    ref_model: Any,
    args: Any,
    processing_class: Any,
    peft_config: Any,
    *,
    data: tuple[Any, Any],
    others: dict[str, Any],
) -> PreTrainedTokenizerBase:
    """Checks the arguments of `TDPOTrainer` and what its models are; returns `processing_class`, a tokenizer.

    Args:
        data: for training, without which the policy is only evaluated, and for evaluation.
        others: arguments of transformers' Trainer.

    Raises:
        TypeError, ValueError: one has the wrong type, is missing, or has no meaning here; the message names it.
    """
    check_needs_no_logits(others)
    if not isinstance(args, TDPOConfig):
        raise TypeError(f"args is of {type(args).__name__}; a TDPOConfig is needed")
    use_one_gpu(args, model)
    check_needed(args)
    train_dataset, _ = data
    if any(map(is_stream, data)):
        check_stream_options(args, trains=is_stream(train_dataset))
    for name, given in {"model": model, "ref_model": model if ref_model is None else ref_model}.items():
        if not isinstance(given, nn.Module):
            raise TypeError(f"{name} is {given!r}; a causal language model is needed, loaded")
        check_attention(name, given, args)
    if processing_class is None:
        raise ValueError("processing_class is None; the policy's tokenizer is required")
    if isinstance(processing_class, ProcessorMixin):
        raise TypeError(
            f"processing_class is {type(processing_class).__name__}, of a vision or audio model; only text is "
            "supported, so give its tokenizer"
        )
    if not isinstance(processing_class, PreTrainedTokenizerBase):
        raise TypeError(f"processing_class is {processing_class!r}; a tokenizer is needed")
    with autocast(args):
        check_models(model, ref_model, args, processing_class, peft_config, trains=train_dataset is not None)
    return processing_class


def check_needs_no_logits(arguments: dict[str, Any]) -> None:
    """Refuses a trainer's arguments that work on logits, by name.

    Raises:
        ValueError: one is given.
    """
    for name in _NEED_LOGITS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} is given, but no logits are formed that it could work on: leave it out")


def prepare_policy(
    model: nn.Module, ref_model: nn.Module | None, args: TDPOConfig, tokenizer: Any, peft_config: Any
) -> nn.Module:
    """The policy with its adapters and without dropout, as `args` say.

    Raises:
        ValueError: new adapters work outside the model, or the reference shares what they train.
    """
    if peft_config is not None:
        from peft import get_peft_model

        set_seed(args.seed)  # seeds the adapters' weights
        model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        with autocast(args):
            check_policy(model, ref_model, tokenizer, trains=True)
    if args.disable_dropout:
        disable_dropout(model)
    return model


def learning_rate(args: TDPOConfig, policy: nn.Module) -> float:
    """The learning rate of `args`, or the default one of what trains: adapters, or the whole policy."""
    if args.learning_rate is not None:
        return args.learning_rate
    return _LEARNING_RATE_OF_ADAPTERS if has_adapters(policy) else _LEARNING_RATE
