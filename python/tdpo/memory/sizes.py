"""Sizes of memory as people write them. Free of torch."""

from __future__ import annotations

import re

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def bytes_of(name: str, text: str) -> int:
    """The bytes that a text such as 80GB (80e9), 40 GiB (40 * 2**30) or 1.5TB stands for.

    Args:
        name: of the option, for errors.

    Raises:
        ValueError: it is no positive number with a unit.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([MGT]I?B)\s*", text.upper())
    size = round(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size <= 0:
        raise ValueError(f"{name} is {text!r}; a size with its unit is needed, such as 80GB or 40GiB")
    return size


def text_of(size: int) -> str:
    """Bytes as a text with three digits, in MB or GB."""
    unit, name = (10**9, "GB") if size >= 10**9 else (10**6, "MB")
    value = size / unit
    return f"{value:,.0f} {name}" if value >= 100 or size == 0 else f"{value:.3g} {name}"
