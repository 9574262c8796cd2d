"""Every operator of row states and gradients in plain torch, for the devices that have no compiled kernels.

They are registered for all devices at once; a compiled kernel (csrc/cpu, csrc/cuda) takes precedence on its own device.
With TDPO_KERNELS=torch the compiled ones stay out, and these serve everywhere. The values, the edge cases and the
errors are those of the compiled kernels: the arithmetic is that of csrc/row_state.h (`torch_row_state`), and the checks
are the same code (csrc/checks.h). Rows are taken in blocks, so that temporaries have a bounded size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .operators import STATE_SIZE, state_dtype
from .selection import warn_once
from .torch_row_state import RowGradient, RowStates, Scale, finalized, keep_rows, merged, sums_of

_ops = torch.ops.tdpo_ext
# Entries of the logits in a block. About eight temporaries of a block are there at a time, each of its size in float32:
# on a CPU they stay in its caches, and elsewhere they are large enough to keep a GPU busy, and 256 MiB in all.
_CPU_BLOCK = 1 << 18
_BLOCK = 1 << 23


def _views(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors (..., n) of one shape as matrices (rows, n), which together are all rows in order. Nothing is copied."""
    if tensors[0].dim() == 1:
        yield tuple(tensor[None] for tensor in tensors)
        return
    try:
        matrices = tuple(tensor.view(-1, tensor.shape[-1]) for tensor in tensors)
    except RuntimeError:  # the leading dimensions of one are not regular
        for parts in zip(*tensors):
            yield from _views(*parts)
        return
    yield matrices


def _blocks(*tensors: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """The rows of tensors (..., n) a block at a time: which they are, counted over all, and views (rows, n) of them."""
    entries = _CPU_BLOCK if tensors[0].device.type == "cpu" else _BLOCK
    length = max(1, entries // tensors[0].shape[-1])
    first = 0
    for matrices in _views(*tensors):
        for block in zip(*(matrix.split(length) for matrix in matrices)):
            rows = slice(first, first + len(block[0]))
            yield rows, block
            first = rows.stop


class _Rows:
    """How rows of logits are read: what the operators of rows have in common."""

    def __init__(self, logits, labels, *, vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl):
        self.dtype = state_dtype(logits.dtype)
        self.scale = Scale.of(temperature, self.dtype)
        self.softcap = softcap
        self.reverse_kl = reverse_kl
        labels = labels.reshape(-1, 1)
        self.counted = labels != ignore_index  # (rows, 1)
        self.wrong = self.counted & ((labels < 0) | (labels >= vocab_size))
        self.allowed = f"0 to {vocab_size - 1} and ignore_index {ignore_index}"
        columns = labels - vocab_start
        self.has_label = self.counted & (columns >= 0) & (columns < logits.shape[-1])
        self.columns = columns.clamp(0, max(0, logits.shape[-1] - 1))

    def capped(self, logits: Tensor) -> Tensor:
        """Logits in the precision of the rows, after the softcap. Dense: torch sums rows of other strides otherwise."""
        logits = logits.to(self.dtype).contiguous()
        return torch.tanh(logits * (1 / self.softcap)) * self.softcap if self.softcap > 0 else logits

    def at_labels(self, logits: Tensor, rows: slice) -> Tensor:
        """The logits at the labels, after the softcap: (rows, V) -> (rows, 1). Any where the label is elsewhere."""
        return self.capped(logits.gather(1, self.columns[rows]))


def _was_looked_at(tensor: Tensor) -> bool:
    """Whether the checks have seen what a tensor holds: a CPU's, while the host does not wait for another device."""
    return tensor.device.type == "cpu"


def _refuse_on_device(results: Tensor, wrong: Tensor, message: str) -> Tensor:
    """Stops the device where any is wrong, if it can; the results with NaN there, if it cannot."""
    if _was_looked_at(wrong):
        return results
    key = torch._C._dispatch_key_for_device(wrong.device.type)
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::_assert_async.msg", key):
        torch._assert_async(~wrong.any(), f"tdpo_ext: {message}")
    return results.masked_fill(wrong, math.nan)


def _empty_states(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """States (*shape, STATE_SIZE) of no entries, on the device of `like`."""
    states = like.new_zeros((*shape, STATE_SIZE), dtype=dtype)
    states[..., :2] = -math.inf
    return states


def row_states(logits: Tensor, ref_logits: Tensor, labels: Tensor, **options) -> Tensor:
    """See `operators.row_states`. Where a device cannot stop at a label out of range, its row is NaN."""
    _ops.check_rows(logits, ref_logits, labels, **options)
    warn_once(logits.device)
    rows = _Rows(logits, labels, **options)
    states = _empty_states(logits, (labels.numel(),), rows.dtype)
    if logits.numel() > 0:
        for some, (z, r) in _blocks(logits, ref_logits):
            sums = sums_of(rows.capped(z), rows.capped(r), rows.scale.base2, rows.reverse_kl)
            at_labels = [torch.where(rows.has_label[some], rows.at_labels(x, some), 0.0) for x in (z, r)]
            states[some] = torch.where(rows.counted[some], torch.cat([sums, *at_labels], dim=1), states[some])
    states = _refuse_on_device(states, rows.wrong, f"labels hold one out of range; allowed are {rows.allowed}")
    return states.view(*labels.shape, STATE_SIZE)


def merge_row_states(states: Tensor, *, reverse_kl: bool) -> Tensor:
    """See `operators.merge_row_states`."""
    _ops.check_slices(states)
    if len(states) == 0:
        return _empty_states(states, states.shape[1:-1], states.dtype)
    slices = [RowStates.unstack(of_slice) for of_slice in states]
    return functools.reduce(lambda a, b: merged(a, b, reverse_kl), slices).stacked()


def finalize_row_states(
    states: Tensor, labels: Tensor, *, ignore_index: int, temperature: float, reverse_kl: bool
) -> Tensor:
    """See `operators.finalize_row_states`. Where a device cannot stop at a maximum out of range, its row is NaN."""
    _ops.check_states(states, labels, ignore_index=ignore_index)
    state, counted = RowStates.unstack(states), labels != ignore_index
    values = finalized(state, Scale.of(temperature, states.dtype).base2, reverse_kl)
    wrong = state.is_out_of_range() & counted
    values = _refuse_on_device(values, wrong, "logits or ref_logits have a maximum that is too large")
    return torch.where(counted, values, 0.0)


def logit_gradient_out(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    states: Tensor,
    logps_grad: Tensor,
    kl_grad: Tensor,
    *,
    out: Tensor,
    **options,
) -> None:
    """See `operators.logit_gradient_out`."""
    _ops.check_rows(logits, ref_logits, labels, **options)
    _ops.check_gradient(logits, ref_logits, labels, states, logps_grad, kl_grad, out)
    warn_once(logits.device)
    if logits.numel() == 0:
        return
    rows = _Rows(logits, labels, **options)
    states, logps_grad, kl_grad = (tensor.reshape(labels.numel(), -1) for tensor in (states, logps_grad, kl_grad))
    label_extra = torch.where(rows.has_label, logps_grad * rows.scale.natural, 0.0)
    is_active = rows.counted & ((logps_grad != 0) | (kl_grad != 0))
    for some, (z, r, dz) in _blocks(logits, ref_logits, out):
        gradient = RowGradient.of(
            states[some], logps_grad[some], kl_grad[some], rows.scale, rows.softcap, rows.reverse_kl
        )
        # The label's entry is computed apart, so that its extra joins before the one rounding: from logits that an
        # in-place gradient has yet to overwrite.
        at_label = gradient.at(rows.at_labels(z, some), rows.at_labels(r, some), label_extra[some])
        dz.copy_(keep_rows(gradient.at(rows.capped(z), rows.capped(r)), is_active[some]))
        dz.scatter_(1, rows.columns[some], keep_rows(at_label, is_active[some]).to(dz.dtype))


for _kernel in (row_states, merge_row_states, finalize_row_states, logit_gradient_out):
    torch.library.impl(f"tdpo_ext::{_kernel.__name__}", "default", _kernel)
