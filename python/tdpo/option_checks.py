"""The checks of the options' values: of a `TDPOConfig`, and of the command line's before anything slow is loaded.

Free of torch and transformers.
"""

from __future__ import annotations

from dataclasses import Field, fields
from os import PathLike
from typing import Any, get_type_hints

from .data.forms import column_mapping
from .options import USED_BY, ObjectiveOptions, TDPOOptions
from .plain import checks
from .refusals import OF_TRANSFORMERS, check_numbers, refuse


def check_options(options: Any) -> None:
    """Checks the values of the loss, of the reference, of the data and of the run, each alone and beside the others.

    Args:
        options: whatever has the attributes of TDPOOptions and of transformers' TrainingArguments.

    Raises:
        TypeError, ValueError: one is of the wrong type or out of range, or they contradict each other; the message
            names it.
    """
    check_each(TDPOOptions, options)
    check_objective_options(options)
    if options.max_prompt_length >= options.max_length:
        raise ValueError(
            f"max_prompt_length is {options.max_prompt_length}; it must be below max_length, {options.max_length}"
        )
    column_mapping(options.columns)
    columns = options.token_columns
    if columns is not None and not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
        raise TypeError(f"token_columns is {columns!r}; a list of names is needed")
    if not isinstance(options.reference_cache, (str, PathLike, type(None))):
        raise TypeError(f"reference_cache is {options.reference_cache!r}; the path of a folder is needed")
    check_numbers(options)
    refuse(options, OF_TRANSFORMERS)


def check_stream_options(options: Any, *, trains: bool) -> None:
    """Refuses options that can't work with streams, by name.

    Args:
        options: as `check_options` takes them.
        trains: the training data are a stream, not only evaluation data.

    Raises:
        ValueError: one is set, or `max_steps` is not.
    """
    refused = {
        "precompute_reference": (
            options.precompute_reference,
            "a cache holds the states of rows by number: leave it out",
        ),
        "dataset_num_proc": (options.dataset_num_proc is not None, "its reader tokenizes it: leave it out"),
        "dataloader_num_workers": (options.dataloader_num_workers > 1, "one worker reads it as a whole: set 0 or 1"),
        "dataloader_drop_last": (options.dataloader_drop_last, "all of its batches are used: leave it out"),
    }
    if trains:
        strategy = options.train_sampling_strategy
        order = "it can't be sorted: set random, for a shuffle buffer, or sequential"
        refused["train_sampling_strategy"] = (strategy not in ("random", "sequential"), order)
        for name in ("eval_strategy", "save_strategy", "logging_strategy"):
            refused[name] = (getattr(options, name) == "epoch", "it has no epochs: set steps")
    for name, (given, reason) in refused.items():
        if given:
            value = getattr(options, name)
            raise ValueError(f"{name} is {getattr(value, 'value', value)}, but the data are a stream, and {reason}")
    if trains and options.max_steps <= 0:
        raise ValueError("max_steps is not set, but the training data are a stream, which has no end: set it")


def check_objective_options(options: ObjectiveOptions) -> None:
    """Raises TypeError or ValueError where an option is out of range, or set although the loss does not use it."""
    checks.check_tdpo_options(options.beta, options.alpha, "tdpo2")
    checks.check_label_smoothing(options.label_smoothing)
    checks.real("simpo_gamma", options.simpo_gamma, least=0)
    name, used = options.variant, ("variant", *USED_BY[options.variant])
    for option in fields(ObjectiveOptions):
        value = getattr(options, option.name)
        if option.name not in used and value != option.default:
            raise ValueError(f"{option.name} is {value}, but the loss {name} does not use it: leave it unset")


def check_each(option_class: Any, options: Any) -> None:
    """Checks the options of a class each alone; raises as `check_options` does."""
    types = get_type_hints(option_class)
    for item in fields(option_class):
        _check(item, types[item.name], getattr(options, item.name))


def _check(item: Field, kind: Any, value: Any) -> None:
    """Checks an option's value against its type and its metadata (see `options.option`)."""
    choices, least = item.metadata.get("choices"), item.metadata["help"].least
    if value is None and item.default is None:
        return
    if choices is not None:
        checks.choice(item.name, value, choices)
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{item.name} is {value!r}; True or False is needed")
    if least is not None:
        (checks.integer if kind in (int, int | None) else checks.real)(item.name, value, least=least)
