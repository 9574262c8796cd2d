"""How the reference cache stores hidden states: the bytes of a token in each precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SCALE_BYTES = torch.float32.itemsize


@dataclass(frozen=True)
class StoredStates:
    """Hidden states (tokens, D) as bytes, (tokens, `bytes_per_token`)."""

    dtype: torch.dtype
    # A scale stands after the numbers of every token, float32, by which they were divided: the largest becomes the
    # largest that the dtype holds.
    scaled: bool = False

    def bytes_per_token(self, width: int) -> int:
        return width * self.dtype.itemsize + (_SCALE_BYTES if self.scaled else 0)

    def pack(self, states: Tensor) -> np.ndarray:
        """uint8 (tokens, bytes_per_token) of the states (tokens, D), on any device."""
        if not self.scaled:
            return _bytes(states.to(self.dtype).cpu())
        states = states.float()
        scales = states.abs().amax(dim=1, keepdim=True) / torch.finfo(self.dtype).max
        scales = torch.where(scales > 0, scales, 1.0)
        return np.concatenate([_bytes((states / scales).to(self.dtype).cpu()), _bytes(scales.cpu())], axis=1)

    def unpack(self, stored: np.ndarray) -> Tensor:
        """The states (tokens, D) of uint8 (tokens, bytes_per_token); float32 where they have a scale."""
        stored_bytes = torch.from_numpy(stored.copy())
        if not self.scaled:
            return stored_bytes.view(self.dtype)
        numbers, scales = stored_bytes[:, :-_SCALE_BYTES].contiguous(), stored_bytes[:, -_SCALE_BYTES:].contiguous()
        return numbers.view(self.dtype).float() * scales.view(torch.float32)


def _bytes(tensor: Tensor) -> np.ndarray:  # uint8 (tokens, bytes)
    return tensor.contiguous().view(torch.uint8).numpy()


# By the names that `reference_dtype` takes.
STORED_STATES = {
    "bfloat16": StoredStates(torch.bfloat16),
    "float16": StoredStates(torch.float16),
    "float32": StoredStates(torch.float32),
    "float8": StoredStates(torch.float8_e4m3fn, scaled=True),
}
