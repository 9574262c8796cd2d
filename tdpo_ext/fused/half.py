"""float16 gradients that keep their small numbers: each row carries a power of two of its own, taken off in float32.

float16 has no numbers below 6e-8. dL/dz of a likely token is a probability times the slope of the loss, and both may be
tiny; loss scaling multiplies what backward gets, but the gradients of a preference loss are formed before, in the
forward pass. So

* the upstream gradients of a row are multiplied by `dz_scales` before its dz is rounded to float16;
* products of dz are taken to float32, where the scale is taken off again (`WeightUnit` for dW, which sums over rows);
* gradients wait for backward with a unit for every row (`stored.ScaledGradient`), and are rounded when the gradient of
  the loss has joined them.

dW keeps the rows that are not below 2^-38 of a product's largest factor times hidden state: one unit serves all rows.
bfloat16 has the exponents of float32, and needs none of this.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops import operators
from ..ops.matmul import product
from ..ops.operators import RowOptions

_LARGEST_DZ, _LARGEST_OPERAND = 13, 14  # exponents of 2: float16 ends at 2^16, and these leave room for rounding
_EXPONENTS = 100  # of 2, either way: a scale and what it multiplies stay within float32
_EXPONENT_BITS = 0x7F800000  # of a float32: without the others it is a power of two


def power_of_two(size: Tensor) -> Tensor:
    """The largest power of two that is not above `size`, between 2^-100 and 2^100, float32; what is no number stays."""
    size = size.float()
    whole = size.contiguous().view(torch.int32).bitwise_and(_EXPONENT_BITS).view(torch.float32)
    return torch.where(size.isfinite(), whole.clamp(2.0**-_EXPONENTS, 2.0**_EXPONENTS), size)


def dz_scales(logps_grad: Tensor, kl_grad: Tensor, kl: Tensor, options: RowOptions) -> Tensor:
    """What the upstream gradients of rows are multiplied by, so that no entry of their dz exceeds 2^14: (rows,).

    By docs/math.md, an entry is at most |dlogps| + |dkl| over the temperature; of the reverse KL, whose gradient
    p_v (log p_v - log q_v - kl) may be large, at most |dlogps| + |dkl| (2 kl + 1).
    """
    largest_of_kl = 2 * kl + 1 if options.reverse_kl else 1.0
    of_kl = torch.where(kl_grad != 0, kl_grad.abs() * largest_of_kl, 0.0)
    bound = (logps_grad.abs() + of_kl) / options.temperature
    return 2.0**_LARGEST_DZ / power_of_two(bound)


def in_units(exact: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, D), float32, as numbers that float16 holds and their units (n, 1), powers of two."""
    units = power_of_two(_largest(exact)) * 2.0**-_LARGEST_OPERAND
    return exact / units, units


def _largest(rows: Tensor) -> Tensor:
    """The largest size in each row, (n, 1), float32."""
    return torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)


class WeightUnit:
    """The unit of a float32 sum of products dz^T hidden, whose operands are float16: the sum times `value` is meant.

    It is 0 while nothing was summed.
    """

    def __init__(self, device: torch.device):
        self.value = torch.zeros((), dtype=torch.float32, device=device)

    def weigh(self, hidden: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden (n, D) times factors (n, 1), in the unit from now on; what the sum so far is to be multiplied by)."""
        shrink = self.raise_to(power_of_two((_largest(hidden) * factors.abs()).amax()) * 2.0**-_LARGEST_OPERAND)
        return (hidden * (factors / self.value)).to(hidden.dtype), shrink

    def raise_to(self, unit: Tensor) -> Tensor:
        """Takes the larger unit of both; returns what the sum so far is to be multiplied by."""
        before, self.value = self.value, torch.maximum(self.value, unit)
        return before / self.value


def weighted_row_sum(dz: Tensor, factors: Tensor) -> Tensor:
    """The sum of rows of dz (n, V), each times its factor (n, 1), in float32: (V,)."""
    unit = power_of_two(factors.abs().amax())
    total = torch.empty(1, dz.shape[1], dtype=operators.state_dtype(dz.dtype), device=dz.device)
    return product((factors / unit).to(dz.dtype).t(), dz, total)[0] * unit
