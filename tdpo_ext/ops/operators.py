"""One typed wrapper for each operator of csrc/ops.cpp, and its fake kernel (shapes and dtypes without data).

Kernels in plain torch, for devices without compiled ones, are in `torch_kernels`. The differentiable operator
`token_divergence` is in `tdpo_ext.divergence`, beside its autograd.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import memory
from ._load import load

compiled = load()
_ops = torch.ops.tdpo_ext

STATE_SIZE = 9  # numbers in a row state, csrc/row_state.h
TOKEN_VALUES = 6  # fields of TokenValues there, and of TokenDivergence here


@dataclass(frozen=True)
class RowOptions:
    """How rows of logits are read.

    Attributes:
        vocab_start: token id of the first column.
        vocab_size: entries of the whole vocabulary; labels are in [0, vocab_size).
        ignore_index: label of rows that contribute nothing.
        temperature: logits are divided by it.
        softcap: logits become softcap * tanh(logits / softcap) first; 0 for none.
        reverse_kl: whether `kl` is KL(policy || reference) instead of KL(reference || policy).
    """

    vocab_start: int
    vocab_size: int
    ignore_index: int = -100
    temperature: float = 1.0
    softcap: float = 0.0
    reverse_kl: bool = False

    def as_keywords(self) -> dict[str, int | float]:
        """The operators' keyword arguments, which have these names."""
        return vars(self)

    def from_column(self, first: int) -> RowOptions:
        """The same for a slice of the columns that begins at `first`."""
        return replace(self, vocab_start=self.vocab_start + first)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Values and states are float64 for float64 logits, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_states(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    options: RowOptions,
) -> Tensor:  # (..., STATE_SIZE)
    """States of rows over one slice of the vocabulary."""
    return _ops.row_states(logits, ref_logits, labels, **options.as_keywords())


def merge_row_states(
    states: Tensor,  # (slices, ..., STATE_SIZE)
    *,
    reverse_kl: bool,
) -> Tensor:  # (..., STATE_SIZE)
    """States of several slices of the vocabulary, merged. They are of one direction of the KL."""
    return _ops.merge_row_states(states, reverse_kl=reverse_kl)


def finalize_row_states(
    states: Tensor,  # (..., STATE_SIZE)
    labels: Tensor,  # (...)
    options: RowOptions,  # those of the states
) -> Tensor:  # (TOKEN_VALUES, ...)
    """Values of rows from their states over the whole vocabulary, in the order of TokenDivergence."""
    return _ops.finalize_row_states(
        states,
        labels,
        ignore_index=options.ignore_index,
        temperature=options.temperature,
        reverse_kl=options.reverse_kl,
    )


def logit_gradient(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    states: Tensor,  # (..., STATE_SIZE)
    *,
    logps_grad: Tensor,  # (...)
    kl_grad: Tensor,  # (...)
    options: RowOptions,
) -> Tensor:  # (..., V)
    """dL/dlogits of one slice of the vocabulary from dL/dlogps and dL/dkl, in new memory."""
    return _ops.logit_gradient(logits, ref_logits, labels, states, logps_grad, kl_grad, **options.as_keywords())


def logit_gradient_out(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V); not read where kl_grad is 0
    labels: Tensor,  # (...)
    states: Tensor,  # (..., STATE_SIZE)
    *,
    logps_grad: Tensor,  # (...)
    kl_grad: Tensor,  # (...)
    options: RowOptions,
    out: Tensor,  # (..., V), of the logits' dtype or, for float32 logits, bfloat16 or float16
) -> None:
    """`logit_gradient` written into `out`, which may be `logits` itself or, on a CPU, `narrowed(logits, dtype)`."""
    _ops.logit_gradient_out(logits, ref_logits, labels, states, logps_grad, kl_grad, **options.as_keywords(), out=out)


def narrowed(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of a narrower dtype, (..., V), each row of which begins where that of the logits does."""
    return logits.view(dtype)[..., : logits.shape[-1]]


def scale_unless_one(tensor: Tensor, factor: Tensor) -> None:
    """tensor *= factor; a no-op if factor is 1 on the CPU, and with a CUDA kernel, which finds it out on the device."""
    _ops.scale_unless_one(tensor, factor)


def matmul_float32(
    a: Tensor,  # (M, K)
    b: Tensor,  # (K, N)
    *,
    accumulate: bool,
    out: Tensor,  # (M, N), float32; or bfloat16, as the operands, if it is not added to
) -> None:
    """out = a @ b, or out += a @ b, in float32, rounded once (the kernel is in `tdpo_ext.ops.matmul`)."""
    _ops.matmul_float32(a, b, accumulate=accumulate, out=out)


@torch.library.register_fake("tdpo_ext::row_states")
def _(logits, ref_logits, labels, **_options):
    return logits.new_empty((*labels.shape, STATE_SIZE), dtype=state_dtype(logits.dtype))


@torch.library.register_fake("tdpo_ext::merge_row_states")
def _(states, **_options):
    return states.new_empty(states.shape[1:])


@torch.library.register_fake("tdpo_ext::finalize_row_states")
def _(states, labels, **_options):
    return states.new_empty((TOKEN_VALUES, *labels.shape))


@torch.library.register_fake("tdpo_ext::logit_gradient")
def _(logits, *_tensors, **_options):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("tdpo_ext::logit_gradient_out")
def _(*_tensors, **_options):
    return None


@torch.library.register_fake("tdpo_ext::matmul_float32")
def _(a, b, *, accumulate, out):
    return None


@torch.library.register_fake("tdpo_ext::scale_unless_one")
def _(tensor, factor):
    return None


@torch.library.impl("tdpo_ext::scale_unless_one", "default")
def _(tensor, factor):
    if tensor.device.type != "cpu" or factor.item() != 1:
        tensor.mul_(factor)


@torch.library.impl("tdpo_ext::logit_gradient", "default")
def _(logits, *tensors, **options):
    out = memory.empty(tuple(logits.shape), logits.dtype, logits.device)
    _ops.logit_gradient_out(logits, *tensors, **options, out=out)
    return out


def _no_double_backward(ctx, *_grads):
    raise RuntimeError("tdpo_ext: double backward through token_divergence is not supported")


torch.library.register_autograd(
    "tdpo_ext::logit_gradient", _no_double_backward, setup_context=lambda ctx, **_call: None
)
