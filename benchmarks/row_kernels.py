"""The two row kernels alone: row states from logits, and the gradient of logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tdpo_ext.ops import operators


@dataclass(frozen=True)
class RowKernels:
    """Calls of the row kernels on given logits.

    Attributes:
        target: that the gradient is written to, (rows, V).
    """

    logits: Tensor  # (rows, V)
    ref_logits: Tensor  # (rows, V)
    labels: Tensor  # (rows,)
    target: Tensor
    softcap: float = 0.0
    reverse_kl: bool = False

    @property
    def options(self) -> operators.RowOptions:
        return operators.RowOptions(0, self.logits.shape[1], softcap=self.softcap, reverse_kl=self.reverse_kl)

    def forward(self) -> Tensor:
        return operators.row_states(self.logits, self.ref_logits, self.labels, self.options)

    def backward(self, kl_grad: float) -> Callable[[], None]:
        """A call of the gradient in place. With a `kl_grad` of 0, as chosen rows of TDPO2 have it, the reference is not
        read."""
        of_rows = self.gradients(kl_grad)
        return lambda: operators.logit_gradient_out(**of_rows, out=self.target)

    def gradients(self, kl_grad: float) -> dict:
        """Arguments of the gradient's operators."""
        ones = torch.ones(len(self.logits), device=self.logits.device)
        return {
            "logits": self.logits,
            "ref_logits": self.ref_logits,
            "labels": self.labels,
            "states": self.forward(),
            "logps_grad": ones,
            "kl_grad": kl_grad * ones,
            "options": self.options,
        }

    def bytes_moved(self) -> dict[str, int]:
        """Bytes that must move: both rows in the forward pass, and beside the gradient those that it needs."""
        read, written = self.logits.nbytes, self.target.nbytes
        return {"forward": 2 * read, "backward": 2 * read + written, "backward without KL": read + written}
