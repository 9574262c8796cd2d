"""Types and ranges of the public functions' arguments: one place, one wording.

Each function returns what it was given once it is found good, and raises TypeError or ValueError with the argument's
name, what it was and what is allowed. Shapes, dtypes and devices of tensors beside each other are checked where they
meet: in csrc/checks.h for logits, in fused/heads.py for hidden states and heads.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What is divided by must have a reciprocal in float32 too.
_SMALLEST, _LARGEST = 1e-30, 1e30


def describe(value: Any) -> str:
    """A value in an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and dtype {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def tensor(name: str, value: Any) -> Tensor:
    """A dense tensor with data, of any dtype."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {describe(value)}; a torch tensor is needed")
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError(f"{name} is {'quantized' if value.is_quantized else value.layout}; a dense tensor is needed")
    if value.device.type == "meta":
        raise ValueError(f"{name} is on the meta device, without data")
    return value


def float_tensor(name: str, value: Any) -> Tensor:
    """A dense tensor of a dtype that the kernels know, without a tangent, which they would lose."""
    if tensor(name, value).dtype not in FLOATS:
        raise TypeError(f"{name} has dtype {value.dtype}; allowed are float32, bfloat16, float16 and float64")
    if forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None:
        raise NotImplementedError(
            f"{name} has a tangent, but forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) are not "
            "supported; use backward, or tdpo_ext.eager"
        )
    return value


def label_tensor(name: str, value: Any) -> Tensor:
    """A dense tensor of int64."""
    if tensor(name, value).dtype != torch.int64:
        raise TypeError(f"{name} has dtype {value.dtype} but torch.int64 is needed")
    return value


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
