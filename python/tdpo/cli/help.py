"""The help pages of the commands that take the trainer's options. Free of torch unless all options are asked for."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from ..options import CommonOptions, DataOptions, ModelOptions, TDPOOptions

HELP_FLAGS = {"-h": False, "--help": False, "--help-all": True}


def usage(command: str) -> str:
    return f"tdpo {command} [config.yaml] [--OPTION VALUE ...]"


def print_help(command: str, description: str, data_options: type[DataOptions], *, everything: bool) -> None:
    """Prints our options, then the most used of transformers', or `everything` that transformers takes."""
    groups: dict[str, type] = {"Models": ModelOptions, "Data": data_options, "TDPO and the run": TDPOOptions}
    end = ""
    if everything:
        from transformers import TrainingArguments

        groups["transformers.TrainingArguments"] = TrainingArguments
    else:
        groups["Often set, of transformers.TrainingArguments"] = CommonOptions
        end = f"`tdpo {command} --help-all` lists every option of transformers.TrainingArguments too."
    ours = {field.name for field in fields(TDPOOptions)}
    print_options(
        usage(command),
        f"{description} Options are flags, or keys of a YAML file; flags override the file.",
        end,
        {
            title: [field for field in fields(options) if options is TDPOOptions or field.name not in ours]
            for title, options in groups.items()
        },
    )


def print_options(
    usage: str, description: str, end: str, groups: Mapping[str, Sequence[Field]], *, hyphens: bool = False
) -> None:
    """Prints a help page: groups of options by their titles, with `hyphens` or underscores in their names."""
    parser = argparse.ArgumentParser(
        usage=usage,
        description=description,
        epilog=end,
        formatter_class=functools.partial(argparse.ArgumentDefaultsHelpFormatter, max_help_position=32, width=118),
        add_help=False,
    )
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for field in options:
            if field.init:
                _add(group, field, field.name.replace("_", "-") if hyphens else field.name)
    parser.print_help()


def _add(group: Any, field: Field, name: str) -> None:
    text = str(field.metadata.get("help", "")).replace("%", "%%")
    default = getattr(field.default, "value", field.default)  # an enumeration's member has a value
    if default in (None, "", MISSING) or "(default" in text:
        default = argparse.SUPPRESS
    group.add_argument(f"--{name}", metavar="", default=default, help=text)
