"""Matrix products whose result keeps float32, whatever the operands' precision."""

import torch
from torch import Tensor

from . import ops


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
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    if a.device.type == "cpu":
        ops.matmul_float32(a, b, accumulate, out)
        return out
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)
