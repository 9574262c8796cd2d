"""Operators that the CPU lacks, or computes otherwise than a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LOW_PRECISION = (torch.bfloat16, torch.float16)
tf32_allowed = False  # for the operator that runs now


def _wide(x: Tensor) -> Tensor:
    """As a GPU computes: low precision in float32."""
    return x.float() if x.dtype in LOW_PRECISION else x


def _into(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


# ---- products: accumulated in float32, rounded once ----


def _tf32(x: Tensor) -> Tensor:
    """Rounded to TF32, as tensor cores read float32 operands where that is allowed."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype == torch.float32 and tf32_allowed:
        return torch.matmul(_tf32(a), _tf32(b))
    return torch.matmul(_wide(a), _wide(b))


def _mm(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    return _into(_product(a, b).to(a.dtype), out)


def _mm_dtype(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor | None = None) -> Tensor:
    return _into(torch.matmul(a.double(), b.double()).to(out_dtype), out)


def _sum(c: Tensor, product: Tensor, beta: float, alpha: float) -> Tensor:
    return alpha * product if beta == 0 else beta * c.to(product.dtype) + alpha * product  # NaN in c does not matter


def _addmm(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None) -> Tensor:
    return _into(_sum(c, _product(a, b), beta, alpha).to(a.dtype), out)


def _addmm_(c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return _addmm(c, a, b, beta=beta, alpha=alpha, out=c)


def _addmm_dtype(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor | None = None,
) -> Tensor:
    return _into(_sum(c, torch.matmul(a.double(), b.double()), beta, alpha).to(out_dtype), out)


# ---- functions that are float32 inside, or whose operands differ ----


def _softmax_of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def softmax(x: Tensor, dim: int, half_to_float: bool, *, out: Tensor | None = None) -> Tensor:
        result = function(_wide(x), dim)
        return _into(result if half_to_float else result.to(x.dtype), out)

    return softmax


def _softmax_backward_of(*, log: bool) -> Callable[..., Tensor]:
    def backward(
        grad: Tensor,
        output: Tensor,
        dim: int,
        input_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
        grad_input: Tensor | None = None,
    ) -> Tensor:
        g, y = _wide(grad), _wide(output)
        result = g - y.exp() * g.sum(dim, True) if log else y * (g - (g * y).sum(dim, True))
        return _into(result.to(input_dtype), out if out is not None else grad_input)

    return backward


def _log_sigmoid(x: Tensor, *, output: Tensor | None = None, buffer: Any = None) -> tuple[Tensor, Tensor]:
    result = torch.nn.functional.logsigmoid(_wide(x)).to(x.dtype)
    return _into(result, output), x.new_empty(0)  # a GPU needs no buffer


def _log_sigmoid_backward(grad: Tensor, x: Tensor, buffer: Any, *, grad_input: Tensor | None = None) -> Tensor:
    return _into((_wide(grad) * torch.sigmoid(-_wide(x))).to(x.dtype), grad_input)


def _histc(x: Tensor, *args: Any, out: Tensor | None = None, **kwargs: Any) -> Tensor:
    return _into(torch.histc(x.double(), *args, **kwargs).to(x.dtype), out)


def _with_out(name: str, function: Callable[..., Any], out: str = "out") -> dict[str, Callable[..., Any]]:
    return {name: function, f"{name}.{out}": function}


SPECIAL: dict[str, Callable[..., Any]] = {
    **_with_out("mm", _mm),
    **_with_out("bmm", _mm),
    **dict.fromkeys(["mm.dtype", "mm.dtype_out"], _mm_dtype),
    **dict.fromkeys(["bmm.dtype", "bmm.dtype_out"], _mm_dtype),
    **_with_out("addmm", _addmm),
    **_with_out("baddbmm", _addmm),
    **dict.fromkeys(["addmm_", "baddbmm_"], _addmm_),
    **dict.fromkeys(["addmm.dtype", "addmm.dtype_out", "baddbmm.dtype", "baddbmm.dtype_out"], _addmm_dtype),
    **_with_out("_softmax", _softmax_of(torch.softmax)),
    **_with_out("_log_softmax", _softmax_of(torch.log_softmax)),
    **_with_out("_softmax_backward_data", _softmax_backward_of(log=False)),
    **_with_out("_log_softmax_backward_data", _softmax_backward_of(log=True)),
    **_with_out("log_sigmoid_forward", _log_sigmoid, "output"),
    **_with_out("log_sigmoid_backward", _log_sigmoid_backward, "grad_input"),
    **_with_out("histc", _histc),
    "_histc": _histc,
}
PRODUCTS = (_mm, _addmm, _addmm_)  # that may read float32 as TF32
