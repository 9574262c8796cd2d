"""The checks of options: of a `TDPOConfig`, and of the command line's before anything slow is loaded.

Free of torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

from .data.forms import column_mapping
from .extras import require_package
from .options import USED_BY, ModelOptions, ObjectiveOptions, RareOptions, TDPOOptions
from .plain import checks
from .refusals import OF_TRANSFORMERS, refuse

_COUNTS = {  # integers, by the least
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "eval_accumulation_steps": 1,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "dataloader_prefetch_factor": 1,
    "torch_empty_cache_steps": 1,
    "seed": 0,
    "data_seed": 0,
}
_STEPS = {  # positive numbers, and the strategy whose "no" does what 0 might be meant for
    "logging_steps": "logging_strategy",
    "eval_steps": "eval_strategy",
    "save_steps": "save_strategy",
}
_NOT_NEGATIVE = (
    *("weight_decay", "max_grad_norm", "warmup_steps", "eval_delay", "adam_epsilon", "neftune_noise_alpha"),
    "router_aux_loss_coef",
)
_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_LARGEST_SEED = 2**32 - 1  # of numpy
_UNSET = -1  # of max_steps
# What transformers reads of optim_args for optimizers of torch; of the others it reads what each takes.
_OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    "adafactor": (),
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused", "adamw_torch_npu_fused", "adamw_torch_xla"), ()),
}
# Options that only work with another one, and that one.
NEEDED = {"reference_cache": "precompute_reference", "reference_dtype": "precompute_reference"}
# The same for `tdpo train` alone: who trains in Python may upload later, by `trainer.push_to_hub`.
NEEDED_BY_TRAIN = dict.fromkeys(
    ("hub_model_id", "hub_strategy", "hub_private_repo", "hub_revision", "hub_always_push"), "push_to_hub"
)
_OF_REWARDS = ("chosen", "rejected", "accuracies", "margins")
# The metrics of an evaluation (tdpo.loss.metrics), and what transformers adds.
EVALUATED = (
    "loss",
    *(f"{rewards}/{name}" for rewards in ("rewards", "rewards_with_kl") for name in _OF_REWARDS),
    *("kl/chosen", "kl/rejected", "kl/margin", "logps/chosen", "logps/rejected"),
    *("entropy", "mean_token_accuracy", "aux_loss", "runtime", "samples_per_second", "steps_per_second"),
)


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
    check_optimizer_options(options)
    refuse(options, OF_TRANSFORMERS)


def check_numbers(options: Any) -> None:
    """Refuses numbers with which nothing could be trained, or which are taken for something else.

    Args:
        options: as `check_options` takes them.

    Raises:
        TypeError, ValueError: the message names the option.
    """
    for name, least in _COUNTS.items():
        if getattr(options, name) is not None:
            checks.integer(name, getattr(options, name), least=least)
    for name in _NOT_NEGATIVE:
        if getattr(options, name) is not None:
            checks.real(name, getattr(options, name), least=0)
    for name, strategy in _STEPS.items():
        value = getattr(options, name)
        if value is not None and checks.real(name, value) <= 0 and getattr(options, strategy) != "no":
            raise ValueError(f"{name} is {value}; it must be positive ({strategy} no turns it off)")
    for name in ("adam_beta1", "adam_beta2"):
        if not checks.real(name, getattr(options, name), least=0) < 1:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be in [0, 1)")
    for name in ("seed", "data_seed"):
        if (getattr(options, name) or 0) > _LARGEST_SEED:
            raise ValueError(f"{name} is {getattr(options, name)}; it must be at most {_LARGEST_SEED}")
    if checks.integer("max_steps", options.max_steps) != _UNSET and options.max_steps < 1:
        raise ValueError(f"max_steps is {options.max_steps}; it must be positive, or left out for num_train_epochs")
    if options.max_steps == _UNSET:
        checks.real("num_train_epochs", options.num_train_epochs, above=0)


def check_optimizer_options(options: Any) -> None:
    """Refuses numbers that the optimizer does not read.

    Args:
        options: as `check_options` takes them.

    Raises:
        ValueError: the message names the option.
    """
    optimizer = getattr(options.optim, "value", options.optim)
    if optimizer not in _OPTIM_ARGS:
        return
    defaults = {item.name: item.default for item in fields(RareOptions)}
    for name in _ADAM:
        if not optimizer.startswith("adamw") and getattr(options, name) != defaults[name]:
            raise ValueError(f"{name} is {getattr(options, name)}, but optim {optimizer} does not use it")
    read = _OPTIM_ARGS[optimizer]
    for part in filter(None, (options.optim_args or "").replace(" ", "").split(",")):
        name, equals, _ = part.partition("=")
        if name not in read or not equals:
            reads = f"reads {', '.join(f'{key}=...' for key in read)}" if read else "reads none"
            raise ValueError(f"optim_args is {options.optim_args!r}, but of such arguments optim {optimizer} {reads}")


def check_needed(options: Any) -> None:
    """Refuses options that nothing reads without another one.

    Args:
        options: as `check_options` takes them.

    Raises:
        ValueError: the message names both.
    """
    check_alone(options, NEEDED, {item.name: item.default for item in fields(TDPOOptions)})


def check_alone(options: Any, needed_by: Mapping[str, str], defaults: Mapping[str, Any]) -> None:
    """Raises ValueError for an option that is set without the one that it needs, which `needed_by` names."""
    for name, needed in needed_by.items():
        value = getattr(options, name)
        if value not in (defaults[name], False) and not getattr(options, needed):
            raise ValueError(f"{name} is {value}, but {needed} is {getattr(options, needed)}: set {needed} too")


def check_best_metric(name: str | None) -> None:
    """Raises ValueError where `metric_for_best_model` is no metric of an evaluation."""
    if name is not None and name.removeprefix("eval_") not in EVALUATED:
        raise ValueError(f"metric_for_best_model is {name}; an evaluation has {', '.join(EVALUATED)}")


def check_without_reference(options: Any) -> None:
    """Refuses options that say something of a reference where the objective needs none and none is given.

    Args:
        options: as `check_options` takes them.

    Raises:
        ValueError: one is set; the message names it.
    """
    default = next(item.default for item in fields(TDPOOptions) if item.name == "kl_warning")
    metric = (options.metric_for_best_model or "").removeprefix("eval_")
    for name, is_set in {
        "kl_direction": options.kl_direction is not None,
        "kl_warning": options.kl_warning not in (0, default),
        "metric_for_best_model": metric.startswith(("kl/", "rewards_with_kl/")),
    }.items():
        if is_set:
            raise ValueError(
                f"{name} is {getattr(options, name)}, but the objective needs no reference, so there is no KL: give "
                f"ref_model, or leave {name} out"
            )


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


def check_own_objective(options: ObjectiveOptions) -> None:
    """Raises ValueError where an option is set beside an objective of one's own, which uses `beta` alone."""
    for option in fields(ObjectiveOptions):
        value = getattr(options, option.name)
        if option.name != "beta" and value != option.default:
            raise ValueError(f"{option.name} is {value}, but objective is given, which does not use it: leave it unset")


def check_model_options(options: ModelOptions, *, loads: bool = True) -> None:
    """Checks the values of options alone and beside the others, without loading anything or asking a hub.

    Args:
        loads: the weights will be loaded, so that the packages for this must be there.

    Raises:
        TypeError, ValueError: one is out of range or contradicts another; the message names it.
        MissingExtra: a package that they need.
    """
    check_each(ModelOptions, options)
    if not options.lora_dropout < 1:
        raise ValueError(f"lora_dropout is {options.lora_dropout}; it must be in [0, 1)")
    if options.ref_gguf_file is not None and options.ref_model is None:
        raise ValueError(f"ref_gguf_file is {options.ref_gguf_file}, but its folder, ref_model, is missing")
    for item in fields(ModelOptions):
        value = getattr(options, item.name)
        if item.name.startswith("lora_") and value != item.default and options.lora_r == 0:
            raise ValueError(f"{item.name} is {value}, but lora_r is 0, so that no adapters are added: set lora_r too")
    if options.lora_target_modules == []:
        raise ValueError("lora_target_modules is [], no layer at all; leave it out for all linear layers but the head")
    for gguf_option in ("gguf_file", "ref_gguf_file"):
        check_dense(options, gguf_option)
    for package, needed in {
        "peft": options.lora_r > 0,
        "bitsandbytes": options.load_in_4bit and loads,
        "gguf": options.gguf_file is not None or options.ref_gguf_file is not None,
    }.items():
        if needed:
            require_package(package)


def check_dense(options: ModelOptions, gguf_option: str) -> None:
    """Raises ValueError for options that contradict a GGUF file's weights, which are loaded whole and dense."""
    gguf_file: Any = getattr(options, gguf_option)
    if gguf_file is None:
        return
    given = f"{gguf_option} is {gguf_file}"
    if options.load_in_4bit:
        raise ValueError(f"load_in_4bit is True, but {given}, whose weights are dequantized: leave one of them out")
    if options.tp_plan is not None:
        raise ValueError(f"tp_plan is {options.tp_plan}, but {given}, which is loaded whole: leave one of them out")


def check_output_dir(output_dir: str | Path, folders: dict[str, Any]) -> None:
    """Refuses to train into a folder that a model was read from.

    Args:
        folders: of the models, or hub names, by the names of the arguments.

    Raises:
        ValueError: its checkpoints would overwrite the model, which the reference and a resumed run start from.
    """
    for name, folder in folders.items():
        if folder and Path(folder).is_dir() and Path(folder).resolve() == Path(output_dir).resolve():
            raise ValueError(
                f"output_dir is {output_dir}, the folder of {name}, which training would overwrite: give another one"
            )


def check_merging(options: ModelOptions, *, trains_adapters: bool) -> None:
    """Raises ValueError where adapters are to be merged in the end, and none are trained."""
    if options.merge_adapters and not trains_adapters:
        raise ValueError("merge_adapters is True, but there are no adapters to merge; set lora_r too")


def check_precision_of_merged(options: ModelOptions, *, merges: bool) -> None:
    """Raises ValueError where the policy's adapters are to be merged into 4-bit weights, to make room for new ones."""
    if merges and options.load_in_4bit:
        raise ValueError(
            f"load_in_4bit is True, but model, {options.model}, holds adapters, which would be merged into the weights "
            "before lora_r adds others: leave lora_r out to train them, or merge them first"
        )


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
