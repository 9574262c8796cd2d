"""Types and ranges of the public functions' arguments: one place, one wording.

Each function returns what it was given once it is found good, and raises TypeError or ValueError with the argument's
name, what it was and what is allowed. Shapes, dtypes and devices of tensors beside each other are checked where they
meet: in csrc/checks.h for logits, in fused/heads.py for hidden states and heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .plain_checks import choice as choice
from .plain_checks import describe as describe
from .plain_checks import function as function
from .plain_checks import integer as integer
from .plain_checks import real as real
from .plain_checks import scale as scale

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
