"""How the reference cache stores hidden states, in each precision."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StoredStates:
    """Hidden states (tokens, D) as tensors of a file."""

    dtype: torch.dtype
    # The numbers of every token are divided by a scale of its own, float32, which makes the largest of them the largest
    # that the dtype holds.
    scaled: bool = False

    def bytes_per_token(self, width: int) -> int:
        return width * self.dtype.itemsize + (torch.float32.itemsize if self.scaled else 0)

    def pack(self, states: Tensor) -> dict[str, Tensor]:
        """The states (tokens, D), on any device, as tensors of as many rows on the CPU."""
        if not self.scaled:
            return {"states": states.to(self.dtype).cpu()}
        states = states.float()
        scales = states.abs().amax(dim=1, keepdim=True) / torch.finfo(self.dtype).max
        scales = torch.where(scales > 0, scales, 1.0)
        return {"states": (states / scales).to(self.dtype).cpu(), "scales": scales.cpu()}

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        """The states (tokens, D) of rows of these tensors; float32 where they have a scale."""
        return stored["states"].float() * stored["scales"] if self.scaled else stored["states"]


# By the names that `reference_dtype` takes.
STORED_STATES = {
    "bfloat16": StoredStates(torch.bfloat16),
    "float16": StoredStates(torch.float16),
    "float32": StoredStates(torch.float32),
    "float8": StoredStates(torch.float8_e4m3fn, scaled=True),
}
