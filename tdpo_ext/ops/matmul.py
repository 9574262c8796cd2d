"""Matrix products that accumulate in float32, whatever the operands' precision."""

from __future__ import annotations

import torch
from torch import Tensor

from . import operators

_ROUNDED_ROWS = 8192  # of a float32 block that is rounded as soon as it is complete


def product(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    out: Tensor,  # (M, N)
    *,
    accumulate: bool = False,
) -> Tensor:
    """out = a @ b, or out += a @ b, in the precision of `out`.

    `out` has the operands' dtype, or is float32 where they are bfloat16 or float16: then no intermediate is rounded to
    the operands' dtype. Returns `out`.
    """
    if a.dtype == out.dtype:
        if accumulate:
            return out.addmm_(a, b)
        if a.dtype == torch.bfloat16 and a.device.type == "cpu":
            return _rounded_product(a, b, out)
        if a.dtype == torch.float32 and a.device.type == "cpu" and b.stride(0) == 1 and a.stride(1) == 1:
            operators.matmul_float32(a, b, accumulate=False, out=out)  # logits: `b` is a transposed weight
            return out
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        operators.matmul_float32(a, b, accumulate=accumulate, out=out)
        return out
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _rounded_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The float32 product, rounded block by block: faster than torch's own where `a` is transposed, as for dW."""
    block = torch.empty(min(_ROUNDED_ROWS, len(a)), b.shape[1], dtype=torch.float32)
    for rows, result in zip(a.split(_ROUNDED_ROWS), out.split(_ROUNDED_ROWS)):
        exact = block[: len(rows)]
        operators.matmul_float32(rows, b, accumulate=False, out=exact)
        result.copy_(exact)
    return out
