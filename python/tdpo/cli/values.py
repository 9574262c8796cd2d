"""From what a flag or a line of a file says to the value of an option.

Every error is one sentence that begins with the place of the value: a flag, or a file and an option.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import Any

from .known import Known

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
_SHORT = {"t": True, "y": True, "f": False, "n": False}  # as transformers' flags have them
_KINDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", list: "a list", dict: "a mapping"}
FILES = ("accelerator_config", "fsdp_config", "deepspeed")  # options that are mappings, or JSON files of one


def value_of_text(option: Known, place: str, text: str) -> Any:
    """The value that a text stands for: of a flag, or a line of a file that YAML makes nothing else of.

    Raises:
        ValueError: the option takes no such value; the message names it and says what it takes.
    """
    for read in (_boolean, _integer, _number):
        value = read(option, text)
        if value is not None:
            return value
    if dict in option.kinds and text.lstrip().startswith("{"):
        _check_json(place, text)
        return text if str in option.kinds else json.loads(text)
    if option.choices and text not in option.choices:
        raise ValueError(f"{place} is {text!r}; allowed are {', '.join(option.choices)}{nearest(text, option.choices)}")
    if list in option.kinds and str not in option.kinds:
        return [text]
    if str not in option.kinds:
        raise refusal(option, place, text)
    if dict in option.kinds and option.name not in FILES and option.name != "columns":
        raise ValueError(f"{place} is {text!r}; a mapping is needed, as JSON where it is a text")
    return text


def value_of_yaml(option: Known, place: str, value: Any, written: str | list[Any] | None) -> Any:
    """The value of a line of a file.

    Args:
        value: what YAML makes of it.
        written: as it is written, or as the items of a list are: YAML makes a boolean of `no`, a number of `1_000` and
            a date of `2024-01-01`, all of which may be names. None for a mapping.

    Raises:
        ValueError: as in `value_of_text`.
    """
    if isinstance(written, list):
        return _value_of_list(option, place, value, written)
    if written is None:
        return _value_of_mapping(option, place, value)
    if type(value) in option.kinds:
        return value_of_text(option, place, value) if isinstance(value, str) else value
    if isinstance(value, int) and not isinstance(value, bool) and float in option.kinds:
        return value
    if value is False and "no" in option.choices:  # `off` too
        return "no"
    if value is False and option.name == "report_to":
        return "none"
    return value_of_text(option, place, written)


def _value_of_list(option: Known, place: str, value: list[Any], written: list[Any]) -> list[str]:
    if list not in option.kinds:
        raise ValueError(f"{place} is {value!r}, a list, which it does not take; {_taken(option)}")
    if not all(isinstance(item, str) for item in written):
        raise ValueError(f"{place} is {value!r}; a list of texts is needed")
    return written


def _value_of_mapping(option: Known, place: str, value: dict[Any, Any]) -> Any:
    if dict in option.kinds:
        return value
    if option.name != "optim_args":
        raise ValueError(f"{place} is {value!r}, a mapping, which it does not take; {_taken(option)}")
    # transformers takes it as `name=value,name=value`
    if any(isinstance(item, (list, dict)) or set(f"{name}{item}") & set(",= ") for name, item in value.items()):
        raise ValueError(f"{place} is {value!r}; names and plain values are needed, without commas, = and spaces")
    return ",".join(f"{name}={item}" for name, item in value.items())


def refusal(option: Known, place: str, text: str) -> ValueError:
    """The error of a value that an option does not take."""
    return ValueError(f"{place} is {text}; {_taken(option)}")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that refuses a name: which of the allowed ones is nearly it, if one is."""
    found = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def _taken(option: Known) -> str:
    if not option.kinds:
        return "its values can be made in Python only: leave it out"
    if option.choices:
        return f"allowed are {', '.join(option.choices)}"
    # A number may be an integer, and a text that stands for a mapping is none of its own.
    kinds = option.kinds - ({int} if float in option.kinds else set())
    return f"{' or '.join(text for kind, text in _KINDS.items() if kind in kinds)} is needed"


def _boolean(option: Known, text: str) -> bool | None:
    words = _WORDS if str in option.kinds else {**_WORDS, **_SHORT}
    return words.get(text.lower()) if bool in option.kinds else None


def _integer(option: Known, text: str) -> int | None:
    try:
        return int(text) if int in option.kinds else None
    except ValueError:
        return None


def _number(option: Known, text: str) -> float | None:
    try:
        return float(text) if float in option.kinds else None
    except ValueError:
        return None


def _check_json(place: str, text: str) -> None:
    try:
        json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is {text!r}, which is not valid JSON: {error}") from error
