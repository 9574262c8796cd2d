"""Gradients that were formed in the forward pass, as they wait for backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import operators
from .half import WeightUnit, in_units

ROUNDED_ROWS = 8192  # rows of a float32 tensor that are rounded at a time


class StoredGradient:
    """A gradient, (n, D) or (n,), in the precision of what it is the gradient of.

    Attributes:
        values: (n, D), of a vector (n, 1); they may be written directly.
    """

    def __init__(self, values: Tensor):
        self._shape = values.shape
        self.values = values if values.dim() == 2 else values[:, None]

    def pieces(self, exact: Tensor, unit: WeightUnit | None = None) -> list[tuple[Tensor, Tensor]]:
        """Of some rows, (n, D), in float32 or better: what is to be written into those rows of which tensors.

        Args:
            unit: of `exact`; None for 1.
        """
        return [(self.values, exact.to(self.values.dtype))]

    @property
    def factor_of_rows(self) -> Tensor:
        """The tensor whose rows are multiplied where those of the gradient shall be."""
        return self.values

    def rounded(self, factor: Tensor) -> Tensor:
        """The gradient times a number on the device; it is written over `values`."""
        operators.scale_unless_one(self.values, factor.to(operators.state_dtype(self.values.dtype)))
        return self._shaped()

    def _shaped(self) -> Tensor:
        """`values` themselves where they have the shape: to a view autograd adds nothing in place, so that the gradient
        of a tied embedding and the sum of both would each have memory of their own."""
        return self.values if self.values.shape == self._shape else self.values.view(self._shape)


class ScaledGradient(StoredGradient):
    """A gradient in float16, each of whose rows has a unit: row i is values[i] * units[i] (`half`)."""

    def __init__(self, values: Tensor):
        super().__init__(values)
        self.units = torch.ones(len(values), 1, dtype=torch.float32, device=values.device)

    def pieces(self, exact: Tensor, unit: WeightUnit | None = None) -> list[tuple[Tensor, Tensor]]:
        values, units = in_units(exact)
        if unit is not None:
            units = units * unit.value
        return [(self.values, values.to(self.values.dtype)), (self.units, units)]

    @property
    def factor_of_rows(self) -> Tensor:
        return self.units

    def rounded(self, factor: Tensor) -> Tensor:
        for values, units in zip(self.values.split(ROUNDED_ROWS), self.units.split(ROUNDED_ROWS)):
            values.copy_(values.float().mul_(units * factor))
        return self._shaped()


def stored(values: Tensor) -> StoredGradient:
    """A gradient that is to be written into `values`."""
    return ScaledGradient(values) if values.dtype == torch.float16 else StoredGradient(values)
