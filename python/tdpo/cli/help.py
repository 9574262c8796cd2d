"""The help pages of the commands that take the trainer's options. Free of torch unless all options are asked for."""

from __future__ import annotations

import textwrap
from dataclasses import MISSING, Field, fields
from typing import Any

from ..options import CommonOptions, TDPOOptions

HELP_FLAGS = {"-h": False, "--help": False, "--help-all": True}


def usage(command: str) -> str:
    return f"tdpo {command} [config.yaml] [--OPTION VALUE ...]"


def print_help(command: str, description: str, *, everything: bool) -> None:
    """Prints our options, then the most used of transformers', or `everything` that transformers takes."""
    from .parse import DataOptions, ModelOptions

    print(f"usage: {usage(command)}\n\n{textwrap.fill(description, 110)}\n")
    print("Options are flags, or keys of a YAML file; flags override the file.")
    groups: dict[str, type] = {"Models": ModelOptions, "Data": DataOptions, "TDPO and the run": TDPOOptions}
    if not everything:
        groups["Often set, of transformers.TrainingArguments"] = CommonOptions
    for title, options in groups.items():
        print(f"\n{title}:")
        for field in fields(options):
            _print_option(field.name, _default(field), field.metadata["help"])
    if not everything:
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
