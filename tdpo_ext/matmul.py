"""Matrix products that accumulate in float32, whatever the operands' precision."""

import torch
from torch import Tensor

from . import ops

_ROUNDED_ROWS = 8192


def product(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    out: Tensor,  # (M, N)
    *,
    accumulate: bool = False,
) -> Tensor:
    """out = a @ b, or out += a @ b, in the precision of `out`.

    `out` has the operands' dtype, or is float32 where they are bfloat16 or float16: then nothing is rounded to the
    operands' dtype on the way. Returns `out`.
    """
    if a.dtype == out.dtype:
        if accumulate:
            return out.addmm_(a, b)
        if a.dtype == torch.bfloat16 and a.device.type == "cpu":
            return _rounded(a, b, out)
        if a.dtype == torch.float32 and a.device.type == "cpu" and b.stride(0) == 1 and a.stride(1) == 1:
            ops.matmul_float32(a, b, False, out)  # logits: `b` is a transposed weight
            return out
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        ops.matmul_float32(a, b, accumulate, out)
        return out
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


def _rounded(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The float32 product, rounded block by block: faster than torch's own where `a` is transposed, as for dW."""
    scratch = torch.empty(min(_ROUNDED_ROWS, len(a)), b.shape[1], dtype=torch.float32)
    for rows, result in zip(a.split(_ROUNDED_ROWS), out.split(_ROUNDED_ROWS)):
        block = scratch[: len(rows)]
        ops.matmul_float32(rows, b, False, block)
        result.copy_(block)
    return out
