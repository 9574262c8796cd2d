"""Scratch memory of the fused losses."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

from . import ops

_ALIGNMENT = 64

# The last call's CPU scratch, kept for the next: fresh pages cost more to touch than the arithmetic on them. On CUDA
# torch's caching allocator does the same.
_kept: list[Tensor] = []


class Scratch:
    """Tensors out of one piece of memory, none of which may outlive the call that took them."""

    def __init__(self, memory: Tensor):
        self._memory = memory
        self._used = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor."""
        size = prod(shape) * dtype.itemsize
        piece = self._memory[self._used : self._used + size]
        self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
        return piece.view(dtype).view(*shape)


@contextmanager
def scratch(wanted: Sequence[tuple[tuple[int, ...], torch.dtype]], device: torch.device):
    """Yields tensors of the (shape, dtype) pairs in `wanted`, on `device`."""
    size = sum(-(-prod(shape) * dtype.itemsize // _ALIGNMENT) * _ALIGNMENT for shape, dtype in wanted)
    kept = device.type == "cpu"
    memory = _kept.pop() if kept and _kept else None
    if memory is None or memory.numel() < size:
        memory = None  # freed before the larger one is made
        memory = ops.empty((size,), torch.uint8, device)
    try:
        taken = Scratch(memory)
        yield [taken.take(shape, dtype) for shape, dtype in wanted]
    finally:
        if kept:
            _kept[:] = [memory]


def release_scratch() -> None:
    """Frees the CPU scratch memory that the fused losses keep between calls (no more than their logits budget)."""
    _kept.clear()
