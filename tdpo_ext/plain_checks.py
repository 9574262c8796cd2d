"""The checks of `checks.py` that need no torch: numbers, words and functions, and the options of the losses.

The trainer's command line reads this file without the package (`tdpo.plain`), and so refuses bad options at once.
"""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

# What is divided by must have a reciprocal in float32 too.
_SMALLEST, _LARGEST = 1e-30, 1e30

VARIANTS = ("tdpo1", "tdpo2")


def describe(value: Any) -> str:
    """A value in an error message."""
    torch = sys.modules.get("torch")  # without which there are no tensors
    if torch is not None and isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def integer(name: str, value: Any, *, least: int | None = None) -> int:
    """A Python or numpy integer; no bool."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} is {describe(value)}; an integer is needed")
    number = int(value)
    if least is not None and number < least:
        raise ValueError(f"{name} is {value}; it must be at least {least}")
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError(f"{name} is {value}; it must fit 64 bits")
    return number


def real(name: str, value: Any, *, least: float | None = None, above: float | None = None) -> float:
    """A finite Python or numpy number; no bool."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {describe(value)}; a number is needed")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value}; it must be finite")
    if above is not None and not number > above:
        raise ValueError(f"{name} is {value}; it must be {'positive' if above == 0 else f'above {above}'}")
    if least is not None and not number >= least:
        raise ValueError(f"{name} is {value}; it must {'not be negative' if least == 0 else f'be at least {least}'}")
    return number


def scale(name: str, value: Any) -> float:
    """A positive number whose reciprocal float32 holds too."""
    if not _SMALLEST <= real(name, value, above=0) <= _LARGEST:
        raise ValueError(f"{name} is {value}; it must be between {_SMALLEST:g} and {_LARGEST:g}")
    return float(value)


def choice(name: str, value: Any, allowed: tuple[str, ...]) -> str:
    """One of the allowed words."""
    if value not in allowed:
        raise ValueError(f"{name} is {describe(value)}; allowed are {' and '.join(map(repr, allowed))}")
    return value


def function(name: str, value: Any) -> Any:
    """Something that can be called."""
    if not callable(value):
        raise TypeError(f"{name} is {describe(value)}; a function is needed")
    return value


def check_beta(beta: float) -> None:
    """Raises TypeError or ValueError unless beta is a positive, finite number."""
    real("beta", beta, above=0)


def check_tdpo_options(beta: float, alpha: float, variant: str) -> None:
    """Raises TypeError or ValueError naming the option that is of the wrong type or out of range."""
    check_beta(beta)
    real("alpha", alpha, least=0)
    choice("variant", variant, VARIANTS)


def check_label_smoothing(label_smoothing: float) -> None:
    """Raises TypeError or ValueError unless it is a probability below 1/2."""
    if not real("label_smoothing", label_smoothing, least=0) < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; it must be in [0, 0.5)")
