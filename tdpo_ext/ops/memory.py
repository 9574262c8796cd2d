"""Scratch memory: tensors as large as logits, weights and their gradients, whose CPU memory is used again."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

_ops = torch.ops.tdpo_ext
_ALIGNMENT = 64  # bytes: a cache line, and the widest vector
_LEAST_ROUNDED = 32 << 20  # bytes of a block below which it is no matter


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on the CPU, blocks of 8 MiB and more come from those that earlier tensors have let go of."""
    if device.type == "cpu":
        return _ops.scratch_empty(shape, dtype=dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def release_scratch() -> None:
    """Frees the CPU memory of earlier logits and gradients that is kept for the next call (1 GiB at most)."""
    _ops.release_scratch()


@dataclass(frozen=True)
class Buffer:
    """Shape and dtype of a tensor that is yet to be allocated.

    Attributes:
        pitch: entries from one row of a matrix to the next, if not its columns.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    pitch: int | None = None

    @property
    def allocated_shape(self) -> tuple[int, ...]:
        return self.shape if self.pitch is None else (self.shape[0], self.pitch)

    @property
    def nbytes(self) -> int:
        """Bytes, rounded up to the alignment."""
        return -(-prod(self.allocated_shape) * self.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT

    def view(self, memory: Tensor) -> Tensor:
        """The tensor at the beginning of a piece of memory, (bytes,)."""
        shape = self.allocated_shape
        whole = memory[: prod(shape) * self.dtype.itemsize].view(self.dtype).view(shape)
        if self.pitch is None:
            return whole
        if self.dtype.itemsize < 4:
            # torch's products in tiles (AMX) read on behind a row, against zeros, of which a NaN makes NaN.
            whole[:, self.shape[1] :] = 0
        return whole[:, : self.shape[1]]


def _rounded_up(nbytes: int, device: torch.device, budget: int) -> int:
    """Bytes of a block: on a GPU one of four sizes between powers of two; what fits the budget still fits it then.

    Its caching allocator would otherwise keep a block of another size for every batch of other lengths.
    """
    if device.type == "cpu" or nbytes < _LEAST_ROUNDED:
        return nbytes
    step = 1 << (nbytes.bit_length() - 3)
    rounded = -(-nbytes // step) * step
    return min(rounded, budget) if nbytes <= budget else rounded


def allocate(device: torch.device, buffers: dict[str, Buffer | None], budget: int) -> dict[str, Tensor]:
    """Uninitialised tensors by name, all in one block so that the next call finds it again; None is left out.

    Args:
        budget: bytes that the block does not exceed where the tensors need no more.
    """
    needed = {name: buffer for name, buffer in buffers.items() if buffer is not None}
    sizes = [buffer.nbytes for buffer in needed.values()]
    block = empty((_rounded_up(sum(sizes), device, budget),), torch.uint8, device)
    pieces = block[: sum(sizes)].split(sizes)
    return {name: buffer.view(piece) for (name, buffer), piece in zip(needed.items(), pieces)}
