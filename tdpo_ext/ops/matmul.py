"""Matrix products that accumulate in float32, whatever the operands' precision."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

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
    the operands' dtype. Returns `out`. On a GPU, float32 operands follow `torch.set_float32_matmul_precision`; see
    `full_precision`.
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


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Within, float32 products on a GPU are float32, whatever `torch.set_float32_matmul_precision` says.

    For logits: TF32 keeps 10 bits of an operand, and a KL near equality would be lost as in bfloat16. Products of
    gradients are left to the setting.
    """
    if device.type != "cuda" or torch.get_float32_matmul_precision() == "highest":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)


def _rounded_product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """The float32 product, rounded block by block: faster than torch's own where `a` is transposed, as for dW."""
    block = torch.empty(min(_ROUNDED_ROWS, len(a)), b.shape[1], dtype=torch.float32)
    for rows, result in zip(a.split(_ROUNDED_ROWS), out.split(_ROUNDED_ROWS)):
        exact = block[: len(rows)]
        operators.matmul_float32(rows, b, accumulate=False, out=exact)
        result.copy_(exact)
    return out
