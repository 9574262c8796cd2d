"""The operators: fake kernels (shapes and dtypes without data) and autograd for the schemas in csrc/ops.cpp.

Everything here is internal; the public functions are in `divergence`, `linear` and `losses`.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from ._load import load
from .shard import VocabShard

compiled = load()
_ops = torch.ops.tdpo_ext

STATE_SIZE = 9  # numbers in a row state, csrc/row_state.h
UNKNOWN_SIZE = 1 << 62  # the size of a sharded vocabulary, until its ranks have met

row_states = _ops.row_states
merge_row_states = _ops.merge_row_states
finalize_row_states = _ops.finalize_row_states
logit_gradient = _ops.logit_gradient
logit_gradient_out = _ops.logit_gradient_out
token_divergence = _ops.token_divergence
matmul_float32 = _ops.matmul_float32
scale_unless_one = _ops.scale_unless_one


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty` for tensors as large as logits or weights; on the CPU their memory is used again."""
    if device.type == "cpu":
        return _ops.large_empty(shape, dtype)
    return torch.empty(shape, dtype=dtype, device=device)


def release_scratch() -> None:
    """Frees the CPU memory of earlier logits and gradients that is kept for the next call (1 GiB at most)."""
    _ops.release_large_memory()


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Values and states are float64 for float64 logits, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("tdpo_ext::row_states")
def _(logits, ref_logits, labels, vocab_start, vocab_size, ignore_index, temperature, softcap):
    return logits.new_empty((*labels.shape, STATE_SIZE), dtype=state_dtype(logits.dtype))


@torch.library.register_fake("tdpo_ext::merge_row_states")
def _(states):
    return states.new_empty(states.shape[1:])


@torch.library.register_fake("tdpo_ext::finalize_row_states")
def _(states, labels, ignore_index, temperature):
    return tuple(states.new_empty(labels.shape) for _ in range(5))


@torch.library.register_fake("tdpo_ext::logit_gradient")
def _(logits, *_):
    return logits.new_empty(logits.shape)


@torch.library.register_fake("tdpo_ext::logit_gradient_out")
def _(*_):
    return None


@torch.library.register_fake("tdpo_ext::matmul_float32")
def _(a, b, accumulate, out):
    return None


@torch.library.register_fake("tdpo_ext::scale_unless_one")
def _(tensor, factor):
    return None


@torch.library.register_fake("tdpo_ext::token_divergence")
def _(logits, ref_logits, labels, *_):
    dtype = state_dtype(logits.dtype)
    values = tuple(logits.new_empty(labels.shape, dtype=dtype) for _ in range(4))
    return (*values, logits.new_empty((*labels.shape, STATE_SIZE), dtype=dtype))


def merge_over(shard: VocabShard | None, local: Callable[[], Tensor], labels: Tensor, dtype: torch.dtype) -> Tensor:
    """The states that `local` makes of this rank's slice, (*labels.shape, state size), merged with the other ranks'."""
    if shard is None:
        return local()
    shape = (*labels.shape, STATE_SIZE)
    like = torch.empty(0, dtype=dtype, device=labels.device)
    return merge_row_states(shard.gather(lambda out: out.copy_(local()), shape, like))


def _token_divergence(
    logits, ref_logits, labels, vocab_start, vocab_size, ignore_index, temperature, softcap, group_name
):
    dtype = state_dtype(logits.dtype)
    shard = None
    if group_name:
        shard = VocabShard(vocab_start, vocab_start + logits.shape[-1], dist._resolve_process_group(group_name))
        facts = {"rows": labels.numel(), "bytes": dtype.itemsize}
        _, found = shard.agree(labels.device, lambda: (None, facts))
        shard.check_same(found, {"rows": "labels", "bytes": "logits"})
        vocab_size = found["vocab_size"][0]

    def local() -> Tensor:
        options = (vocab_start, vocab_size, ignore_index, temperature, softcap)
        return row_states(logits, ref_logits, labels, *options)

    states = merge_over(shard, local, labels, dtype)
    *values, _correct = finalize_row_states(states, labels, ignore_index, temperature)
    return (*values, states)


def _logit_gradient(logits, *others):
    out = empty(logits.shape, logits.dtype, logits.device)
    logit_gradient_out(logits, *others, out)
    return out


for _device in ("cpu", "cuda"):
    torch.library.impl("tdpo_ext::token_divergence", _device, _token_divergence)
    torch.library.impl("tdpo_ext::logit_gradient", _device, _logit_gradient)


def _save_for_backward(ctx, inputs, output):
    logits, ref_logits, labels, *options, _group_name = inputs
    ctx.save_for_backward(logits, ref_logits, labels, output[-1])
    ctx.options = options


def _token_divergence_backward(ctx, logps_grad, _ref_logps_grad, kl_grad, *_):
    logits, ref_logits, labels, states = ctx.saved_tensors
    none = torch.zeros(labels.shape, dtype=states.dtype, device=states.device)
    upstream = (none if grad is None else grad.to(states.dtype) for grad in (logps_grad, kl_grad))
    gradient = logit_gradient(logits, ref_logits, labels, states, *upstream, *ctx.options)
    return (gradient, *(None for _ in range(8)))


torch.library.register_autograd(
    "tdpo_ext::token_divergence", _token_divergence_backward, setup_context=_save_for_backward
)


def _no_double_backward(ctx, *_):
    raise RuntimeError("tdpo_ext: double backward through token_divergence is not supported")


torch.library.register_autograd("tdpo_ext::logit_gradient", _no_double_backward, setup_context=lambda *_, **__: None)
