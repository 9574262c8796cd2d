"""Dataclass fields that document themselves on the command line. Free of torch, which the command line loads late."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str) -> Any:
    """A dataclass field with a default and the help text of its command-line flag."""
    return field(default=default, metadata={"help": help})
