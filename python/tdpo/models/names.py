"""What the option `model` and its like name: a path or a hub's model; and options of models that contradict each other.

Free of torch and transformers.
"""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..extras import require_package
from ..option_checks import check_each
from ..options import ModelOptions


def looks_like_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a path rather than a hub's NAME or OWNER/NAME, of which it has no other form.

    A path begins with `/`, `.` or `~`, ends with `/`, holds more than one `/`, or is FOLDER/NAME with a folder that
    exists. No hub is asked for it.
    """
    name = os.fspath(name)
    owner, slash, _ = name.partition("/")
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or (slash != "" and Path(owner).is_dir())
    )


def check_exists(what: str, name: str) -> None:
    """Raises ValueError where a name is a path, and nothing is there; `what` it would be is said first."""
    if looks_like_path(name) and not Path(name).exists():
        raise ValueError(f"the {what} {name} does not exist")


def is_here(name: str) -> bool:
    """Whether a name is of this disk; where not, it is a hub's."""
    return Path(name).exists() or looks_like_path(name)


def check_model_options(options: ModelOptions) -> None:
    """Checks the values of options alone and beside the others, without loading anything or asking a hub.

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
        "bitsandbytes": options.load_in_4bit,
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
