"""Matrix products that accumulate in float32, whatever the operands' precision."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from . import operators
from ._load import load_brgemm

_ops = torch.ops.tdpo_ext
_BLOCK_ROWS = 8192  # rows of a product that are rounded together, where that is not done tile by tile
_PACKED_ENTRIES = 1 << 24  # of the second operand, 32 MiB, which is packed whole where tiles are rounded
_COPIED_SIDE = 2048  # side of the square blocks that are copied to float32
_without_brgemm = load_brgemm()


@functools.cache
def has_brgemm(dtype: torch.dtype) -> bool:
    """Whether CPU products of this dtype are the optional module's (csrc/cpu/brgemm.cpp)."""
    return not _without_brgemm and _ops.has_brgemm(dtype)


def describe_brgemm() -> str:
    """The dtypes that the optional module multiplies here, or why it multiplies none."""
    if _without_brgemm:
        return _without_brgemm
    dtypes = [str(dtype).removeprefix("torch.") for dtype in (torch.bfloat16, torch.float32) if has_brgemm(dtype)]
    return ", ".join(dtypes) or "not on this processor"


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
        if a.device.type == "cpu":
            is_rounded = a.dtype == torch.bfloat16 and not accumulate and _rounds_faster()
            if is_rounded or (a.dtype == torch.float32 and has_brgemm(a.dtype)):
                operators.matmul_float32(a, b, accumulate=accumulate, out=out)
                return out
        return out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    if not _has_out_dtype(a.device.type, a.dtype):
        operators.matmul_float32(a, b, accumulate=accumulate, out=out)
        return out
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    return torch.mm(a, b, out_dtype=torch.float32, out=out)


@functools.cache
def _has_out_dtype(device_type: str, dtype: torch.dtype) -> bool:
    """Whether torch's own products there give float32 from such operands: a device says so by computing one."""
    if device_type == "cpu" or (device_type == "cuda" and torch.version.cuda):
        return device_type == "cuda"
    operand = torch.ones(16, 16, dtype=dtype, device=device_type)
    try:
        product = torch.mm(operand, operand, out_dtype=torch.float32)
        torch.addmm(product, operand, operand, out_dtype=torch.float32, out=product)
    except RuntimeError:  # NotImplementedError is one
        return False
    return True


@contextlib.contextmanager
def full_precision(operand: Tensor) -> Iterator[None]:
    """Within, float32 products of such operands on a GPU are float32, whatever torch's settings of TF32 say.

    For logits: TF32 keeps 10 bits of an operand, and a KL near equality would be lost as in bfloat16. Products of
    gradients are left to the settings.
    """
    # The newer of torch's two settings: the older one can neither be read nor written where a user has set the newer.
    setting = torch.backends.cuda.matmul
    if operand.device.type != "cuda" or operand.dtype != torch.float32 or setting.fp32_precision == "ieee":
        yield
        return
    precision = setting.fp32_precision
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = "none"  # what it had inherited, it inherits again
        if setting.fp32_precision != precision:
            setting.fp32_precision = precision


@functools.cache
def _rounds_faster() -> bool:
    """Whether bfloat16 products are faster in float32 and then rounded than as torch's own bfloat16 products."""
    return has_brgemm(torch.bfloat16) or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


# ---- the kernel of the operator tdpo_ext::matmul_float32 ----


def _check_product(a: Tensor, b: Tensor, accumulate: bool, out: Tensor) -> None:
    """Raises TypeError or ValueError naming the tensor that the product can't take."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} are not matrices that can be multiplied")
    if a.dtype != b.dtype or a.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise TypeError(f"a has dtype {a.dtype} and b {b.dtype}; both must be bfloat16, float16 or float32")
    if out.shape != (a.shape[0], b.shape[1]) or out.stride(1) != 1:
        raise ValueError(f"out has shape {tuple(out.shape)} and strides {out.stride()}")
    if out.dtype != torch.float32 and (out.dtype != torch.bfloat16 or a.dtype != out.dtype or accumulate):
        raise TypeError(
            f"out has dtype {out.dtype}; it must be float32, or bfloat16 as both operands where nothing is added to it"
        )
    for name, operand in (("a", a), ("b", b)):
        if _may_overlap(out, operand):
            raise ValueError(f"out overlaps {name}")
    if out.shape[0] >= 2 and out.stride(0) < out.shape[1]:
        raise ValueError(f"out has strides {out.stride()}: its rows overlap each other")


def _may_overlap(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors may share memory: addresses of two storages can be compared on a CPU, not on every device."""
    if x.device.type != "cpu" and x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False

    def end_of(tensor: Tensor) -> int:
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
        return tensor.data_ptr() + (last + 1) * tensor.element_size()

    return x.numel() > 0 and y.numel() > 0 and x.data_ptr() < end_of(y) and y.data_ptr() < end_of(x)


@torch.library.impl("tdpo_ext::matmul_float32", "default")
def _matmul_float32(a: Tensor, b: Tensor, *, accumulate: bool, out: Tensor) -> None:
    _check_product(a, b, accumulate, out)
    if out.numel() == 0:
        return
    by_module = a.device.type == "cpu" and has_brgemm(a.dtype) and a.shape[1] > 0
    rounds_tiles = by_module and a.stride(0) == 1 and b.numel() <= _PACKED_ENTRIES  # as for dW
    if out.dtype == torch.bfloat16 and not rounds_tiles:
        _multiply_rounded(a, b, out)
    elif by_module:
        _ops.brgemm(a, b, accumulate=accumulate, out=out)
    elif a.dtype == torch.float32:
        out.addmm_(a, b, beta=1 if accumulate else 0)
    else:
        _multiply_copies(a, b, accumulate, out)


def _multiply_rounded(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b from float32 blocks of its rows."""
    block = torch.empty(min(_BLOCK_ROWS, len(a)), b.shape[1], dtype=torch.float32, device=a.device)
    for rows, result in zip(a.split(_BLOCK_ROWS), out.split(_BLOCK_ROWS)):
        exact = block[: len(rows)]
        operators.matmul_float32(rows, b, accumulate=False, out=exact)
        result.copy_(exact)


def _multiply_copies(a: Tensor, b: Tensor, accumulate: bool, out: Tensor) -> None:
    """out (+)= a @ b from float32 copies of one block at a time: torch's float32 products are exact enough."""
    if not accumulate:
        out.zero_()
    for a_rows, out_rows in zip(a.split(_COPIED_SIDE), out.split(_COPIED_SIDE)):
        for a_block, b_rows in zip(a_rows.split(_COPIED_SIDE, 1), b.split(_COPIED_SIDE)):
            left = a_block.float()
            for b_block, out_block in zip(b_rows.split(_COPIED_SIDE, 1), out_rows.split(_COPIED_SIDE, 1)):
                out_block.addmm_(left, b_block.float())
