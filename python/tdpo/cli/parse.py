"""How YAML files and flags become options.

Importing this, and reading options, loads no torch and no transformers: what is wrong is said at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

from ..extras import require_extra
from ..options import CommonOptions, DataOptions, ModelOptions, TDPOOptions
from .help import HELP_FLAGS, print_help, usage
from .known import Known, known_options
from .values import nearest, refusal, value_of_text, value_of_yaml

if TYPE_CHECKING:
    from ..config import TDPOConfig

_PATHS = {"model", "ref_model", "dataset", "eval_dataset", "reference_cache"}  # which may begin with ~
# transformers refuses bf16 and tf32 where no accelerator has them, unless the CPU is asked for.
_NO_DEVICE = {"use_cpu": True, "tf32": False}


class Options(NamedTuple):
    """All options of a command."""

    models: ModelOptions
    data: DataOptions
    training: TDPOConfig


@dataclass(frozen=True)
class Given:
    """The options of a command as they were given, of good types and values, before anything slow is loaded.

    Attributes:
        models, data: as in `Options`.
        training: what was given of a TDPOConfig's options.
        defaults: of all of them.
        places: what errors say before an option that a file gave: the file.
    """

    models: ModelOptions
    data: DataOptions
    training: dict[str, Any]
    defaults: dict[str, Any]
    places: dict[str, str]

    def value(self, name: str) -> Any:
        """The value of an option of the training."""
        return self.training.get(name, self.defaults[name])

    def options(self) -> Options:
        """The options, with a TDPOConfig.

        Raises:
            TypeError, ValueError: transformers refuses one.
        """
        from ..config import TDPOConfig

        for item in fields(TDPOConfig):
            value, choices = self.training.get(item.name), item.metadata.get("choices")
            if choices and value is not None and value not in choices:  # the list of which may be computed there
                place = self.places.get(item.name, "")
                raise ValueError(f"{place}{item.name} is {value!r}; allowed are {', '.join(choices)}")
        try:
            return Options(self.models, self.data, TDPOConfig(**self.training))
        except TypeError as error:  # of what transformers makes of a mapping, such as accelerator_config
            raise ValueError(str(error)) from error


def read_options(
    command: str,
    description: str,
    arguments: list[str],
    *,
    data_options: type[DataOptions] = DataOptions,
    needs_device: bool = True,
) -> Given:
    """The options of `tdpo command` from `[config.yaml] [--flag value ...]`; flags override the file.

    Args:
        data_options: the class of `Options.data`.
        needs_device: without, options of an accelerator are allowed where there is none, and none is used.

    Raises:
        ValueError: the file is missing or holds no mapping in YAML, a name is no option (the nearest is
            suggested), or a value is of the wrong type or out of range.
        MissingExtra: the trainer's packages are not installed.
        SystemExit: help was asked for, or a flag has too many or too few values.
    """
    for flag, everything in HELP_FLAGS.items():
        if flag in arguments:
            print_help(command, description, data_options, everything=everything)
            raise SystemExit(0)
    require_extra("train")
    from ..option_checks import check_options

    known = known_options((ModelOptions, data_options, TDPOOptions))
    of_file: dict[str, Any] = {}
    path = ""
    if arguments and not arguments[0].startswith("-"):
        path, *arguments = arguments
        of_file = _values_of_file(Path(path), known)
    flags = read_flags(command, arguments, known)
    values = of_file | flags
    places = {name: f"{path}: " for name in of_file.keys() - flags.keys()}
    if not needs_device:
        values |= _NO_DEVICE
    for name in _PATHS & values.keys():
        values[name] = os.path.expanduser(values[name])
    models, data = ({item.name for item in fields(options)} for options in (ModelOptions, data_options))
    training = {name: value for name, value in values.items() if name not in models | data}
    common = {item.name: item.default for item in fields(CommonOptions)}  # where transformers computes them
    defaults = {name: common.get(name) if option.default is None else option.default for name, option in known.items()}
    try:
        check_options(SimpleNamespace(**{**defaults, **training}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{places.get(str(error).partition(' ')[0], '')}{error}") from error
    return Given(
        ModelOptions(**{name: values[name] for name in models & values.keys()}),
        data_options(**{name: values[name] for name in data & values.keys()}),
        training,
        defaults,
        places,
    )


def read_flags(command: str, arguments: list[str], known: Mapping[str, Known]) -> dict[str, Any]:
    """The values of `--flag value ...`; a switch alone is true, and --no_SWITCH is false.

    Raises:
        ValueError: a flag is no option, or a value does not fit it.
        SystemExit: a flag has too many or too few values, as argparse ends.
    """
    switches = {f"no_{name}": name for name, option in known.items() if bool in option.kinds}
    parser = argparse.ArgumentParser(
        prog=f"tdpo {command}", usage=usage(command), add_help=False, argument_default=argparse.SUPPRESS
    )
    for name, option in known.items():
        takes: dict[str, Any] = {"nargs": "+"} if list in option.kinds else {}
        if bool in option.kinds:
            takes = {"nargs": "?", "const": "true"}
        parser.add_argument(*_spellings(name), dest=name, **takes)
    for name, switch in switches.items():
        parser.add_argument(*_spellings(name), dest=switch, action="store_const", const="false")
    for flag in arguments:
        if flag.startswith("--"):
            flag = flag[2:].split("=")[0]
            check_known(flag.replace("-", "_"), [*known, *switches], f"unknown flag --{flag}")
    values = {}
    for name, given in vars(parser.parse_args(arguments)).items():
        option, place = known[name], f"--{name}"
        if not option.kinds:
            raise refusal(option, place, given)
        if not isinstance(given, list):
            values[name] = value_of_text(option, place, given)
        elif len(given) == 1 and str in option.kinds:
            values[name] = value_of_text(option, place, given[0])
        else:
            values[name] = given
    return values


def check_known(name: str, names: list[str], message: str) -> None:
    """Raises ValueError with a message, and the nearest of some names, unless a name is one of them."""
    if name not in names:
        raise ValueError(message + nearest(name, names))


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def _values_of_file(path: Path, known: dict[str, Known]) -> dict[str, Any]:
    from .files import read_options as read_file  # loads PyYAML, which help need not have

    values = {}
    for line in read_file(path):
        check_known(line.name, list(known), f"{path}: unknown option {line.name!r}")
        option, place = known[line.name], f"{path}: {line.name}"
        if not option.kinds:
            raise refusal(option, place, str(line.value))
        values[line.name] = value_of_yaml(option, place, line.value, line.written)
    return values
