"""Scratch memory of the fused losses: one piece a call, so that it is found again by the next."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from . import ops

_ALIGNMENT = 64


def scratch(wanted: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device) -> list[Tensor]:
    """Uninitialised tensors of the (shape, dtype) pairs in `wanted`."""
    sizes = [-(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in wanted]
    memory = ops.empty((sum(sizes),), torch.uint8, device)
    pieces = zip(wanted, memory.split(sizes))
    return [piece[: prod(shape) * dtype.itemsize].view(dtype).view(shape) for (shape, dtype), piece in pieces]
