"""How YAML files and flags become options.

Importing this loads no torch, so that `--help` is quick.
"""

from __future__ import annotations

import difflib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml

from ..options import DataOptions, ModelOptions
from .help import HELP_FLAGS, print_help, usage

if TYPE_CHECKING:
    from ..config import TDPOConfig


class Options(NamedTuple):
    """All options of a command."""

    models: ModelOptions
    data: DataOptions
    training: TDPOConfig


def parse_options(command: str, description: str, arguments: list[str]) -> Options:
    """The options of `tdpo command` from `[config.yaml] [--flag value ...]`; flags override the file.

    Raises:
        ValueError: the file is missing or holds no mapping in YAML, or a key is no option (the nearest is suggested).
        SystemExit: bad flags, as argparse does.
    """
    for flag, everything in HELP_FLAGS.items():
        if flag in arguments:
            print_help(command, description, everything=everything)
            raise SystemExit(0)
    from transformers import HfArgumentParser

    from ..config import TDPOConfig

    option_classes = (ModelOptions, DataOptions, TDPOConfig)
    parser = HfArgumentParser(option_classes, prog=f"tdpo {command}", description=description)
    parser.usage = usage(command)
    names = [field.name for option_class in option_classes for field in fields(option_class) if field.init]
    flags = arguments
    if arguments and not arguments[0].startswith("-"):
        # The file's options come first: where a flag is given twice, argparse takes the last.
        flags = _flags_of_file(Path(arguments[0]), names) + arguments[1:]
    for flag in flags:
        if flag.startswith("--"):
            flag = flag[2:].split("=")[0]
            known = [*names, *(f"no_{name}" for name in names)]
            _check_known(flag.replace("-", "_"), known, f"unknown flag --{flag}")
    return Options._make(parser.parse_args_into_dataclasses(flags))


def _flags_of_file(path: Path, names: list[str]) -> list[str]:
    """A YAML file of options as command-line flags."""
    if not path.is_file():
        raise ValueError(f"the configuration file {path} does not exist")
    try:
        options = yaml.safe_load(path.read_bytes()) or {}
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the configuration file {path} is not valid YAML: {reason}") from error
    if not isinstance(options, dict):
        raise ValueError(f"the configuration file {path} holds no mapping of options to values")
    flags = []
    for name, value in options.items():
        _check_known(name, names, f"{path}: unknown option {name!r}")
        flags += to_flags(name, value)
    return flags


def to_flags(name: str, value: Any) -> list[str]:
    """An option of a YAML file as command-line arguments."""
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    if isinstance(value, dict):
        return [f"--{name}", yaml.safe_dump(value, default_flow_style=True).strip()]
    return [f"--{name}", str(value)]


def _check_known(name: str, names: list[str], message: str) -> None:
    if name not in names:
        nearest = difflib.get_close_matches(name, names, n=1)
        raise ValueError(message + (f"; did you mean {nearest[0]!r}?" if nearest else ""))
