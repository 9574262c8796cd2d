"""How YAML files and flags become options.

Importing this loads no torch, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from ..options import DataOptions, ModelOptions
from .help import HELP_FLAGS, print_help, usage

if TYPE_CHECKING:
    from ..config import TDPOConfig


# transformers refuses bf16 and tf32 where no accelerator has them, unless the CPU is asked for.
_NO_DEVICE = ("--use_cpu", "true", "--tf32", "false")


class Options(NamedTuple):
    """All options of a command."""

    models: ModelOptions
    data: DataOptions
    training: TDPOConfig


def parse_options(
    command: str,
    description: str,
    arguments: list[str],
    *,
    data_options: type[DataOptions] = DataOptions,
    needs_device: bool = True,
) -> Options:
    """The options of `tdpo command` from `[config.yaml] [--flag value ...]`; flags override the file.

    Args:
        data_options: the class of `Options.data`.
        needs_device: without, options of an accelerator are allowed where there is none, and none is used.

    Raises:
        ValueError: the file is missing or holds no mapping in YAML, or a key is no option (the nearest is suggested).
        SystemExit: bad flags, as argparse does.
    """
    for flag, everything in HELP_FLAGS.items():
        if flag in arguments:
            print_help(command, description, data_options, everything=everything)
            raise SystemExit(0)
    from transformers import HfArgumentParser

    from ..config import TDPOConfig

    option_classes: tuple[Any, ...] = (ModelOptions, data_options, TDPOConfig)
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
    if not needs_device:
        arguments = [*arguments, *_NO_DEVICE]
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
