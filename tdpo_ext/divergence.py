"""Per-token log-probabilities and full-vocabulary KL from logits: the values, the operator and its autograd."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.distributed.distributed_c10d as dist
from torch import Tensor

from . import checks
from .derivatives import save, saved
from .ops import operators
from .ops.operators import RowOptions
from .vocab_parallel import Exchange, Fact, VocabShard, check_replicated, digest, local_tensors

_UNKNOWN_SIZE = 1 << 62  # the size of a sharded vocabulary, until its ranks have exchanged their shards
KL_DIRECTIONS = ("forward", "reverse")


class TokenDivergence(NamedTuple):
    """Per-token quantities of a policy against a reference; gradient flows through `logps` and `kl` only.

    All have the shape of the labels and are float32 (float64 for float64 inputs), and exactly 0 where the label is
    `ignore_index`. Logarithms are natural.

    Attributes:
        logps: log p(label), p being the policy.
        ref_logps: log q(label), q being the reference.
        kl: over the whole vocabulary: KL(q || p), forward, the reference first (arXiv 2404.11999, eq. 12), or with
            `kl_direction="reverse"` KL(p || q), the policy first.
        entropy: entropy of p, a metric.
        correct: 1 where the label is the policy's most likely token, else 0; sums count correct tokens.
        tokens: 1 where the label counts, 0 where it is ignored; sums are lengths.
    """

    # The order of TokenValues in csrc/row_state.h.
    logps: Tensor
    ref_logps: Tensor
    kl: Tensor
    entropy: Tensor
    correct: Tensor
    tokens: Tensor

    @property
    def logratio(self) -> Tensor:
        """log p(label) - log q(label), in nats."""
        return self.logps - self.ref_logps

    @classmethod
    def unstack(cls, values: Tensor) -> TokenDivergence:
        """From all fields in one tensor, (fields, ...); metrics and the reference's values are detached."""
        logps, ref_logps, kl, entropy, correct, tokens = values.unbind(0)
        return cls(logps, ref_logps.detach(), kl, entropy.detach(), correct.detach(), tokens.detach())

    def per_sequence(self) -> TokenDivergence:
        """Sums over the last dimension: (B, T) -> (B,)."""
        return TokenDivergence._make(value.sum(-1) for value in self)

    def chunk(self, chunks: int) -> tuple[TokenDivergence, ...]:
        """Splits dimension 0; `chosen, rejected = d.chunk(2)`.

        Raises:
            ValueError: dimension 0 doesn't divide into `chunks` equal parts.
        """
        checks.integer("chunks", chunks, least=1)
        if self.logps.dim() == 0 or self.logps.shape[0] % chunks:
            raise ValueError(
                f"chunks is {chunks} but dimension 0 of shape {tuple(self.logps.shape)} doesn't divide by it"
            )
        return tuple(TokenDivergence._make(parts) for parts in zip(*(value.chunk(chunks) for value in self)))

    def detach(self) -> TokenDivergence:
        """The same values without a graph."""
        return TokenDivergence._make(value.detach() for value in self)


def segment_sums(
    values: Tensor,  # (rows, ...)
    *,
    lengths: Tensor | None = None,  # (segments,)
    offsets: Tensor | None = None,  # (segments + 1,)
) -> Tensor:  # (segments, ...), float64
    """Sums over consecutive rows, by their lengths or their offsets, in float64 and in a fixed order; differentiable.

    The log-probabilities of some thousand tokens add up to numbers of which float32 keeps two decimals, too few for the
    margin between two of them.
    """
    # unsafe: lengths and offsets are ours, and checking them would make the host wait for the device.
    return torch.segment_reduce(values.double(), "sum", lengths=lengths, offsets=offsets, initial=0, unsafe=True)


class TokenColumns(dict[str, Tensor]):
    """Token columns by name; one that is missing is an error that names those that are there."""

    def __missing__(self, name: str) -> Tensor:
        raise MissingColumn(name, tuple(self))


class MissingColumn(KeyError):
    """An objective reads a column that was not given."""

    def __str__(self) -> str:
        name, given = self.args
        return f"objective reads the column {name!r}, but token_columns has {', '.join(map(repr, given)) or 'none'}"


@dataclass(frozen=True)
class TokenRows:
    """One side (chosen or rejected) of some pairs, token by token: the fields of TokenDivergence, each (rows,).

    Rows of a pair are adjacent, in order. Gradient flows through `logps`, `kl` and columns that require it.

    Attributes:
        columns: the call's `token_columns` at these rows, each (rows,).
        rows_of_pair: how many rows each pair has here, in order, (pairs,).
    """

    logps: Tensor
    ref_logps: Tensor
    kl: Tensor
    entropy: Tensor
    correct: Tensor
    tokens: Tensor
    columns: Mapping[str, Tensor]
    rows_of_pair: Tensor

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", TokenColumns(self.columns))

    @property
    def logratio(self) -> Tensor:
        """log p(label) - log q(label), in nats, (rows,)."""
        return self.logps - self.ref_logps

    @property
    def lengths(self) -> Tensor:
        """Tokens that count of each response, (pairs,)."""
        return self.sum(self.tokens)

    def sum(self, values: Tensor) -> Tensor:
        """Sums over each response, in float64: (rows,) -> (pairs,)."""
        return segment_sums(values, lengths=self.rows_of_pair)

    def mean(self, values: Tensor) -> Tensor:
        """Means over each response, 0 for an empty one: (rows,) -> (pairs,)."""
        return self.sum(values) / self.lengths.clamp(min=1)

    def detach(self) -> TokenRows:
        """The same values without a graph."""
        return replace(self, logps=self.logps.detach(), kl=self.kl.detach())


def check_options(ignore_index: int, temperature: float, softcap: float | None, kl_direction: str) -> None:
    """Raises TypeError or ValueError naming the option that is of the wrong type or out of range."""
    checks.integer("ignore_index", ignore_index)
    checks.scale("temperature", temperature)
    if softcap is not None:
        checks.scale("softcap", softcap)
    checks.choice("kl_direction", kl_direction, KL_DIRECTIONS)


def check_shard(shard: VocabShard | None) -> None:
    """Raises TypeError unless `shard` is a VocabShard or None."""
    if shard is not None and not isinstance(shard, VocabShard):
        raise TypeError(f"shard is {checks.describe(shard)}; a VocabShard or None is needed")


def token_divergence(
    logits: Tensor,  # (..., V)
    ref_logits: Tensor,  # (..., V)
    labels: Tensor,  # (...)
    *,
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    kl_direction: str = "forward",
    shard: VocabShard | None = None,
) -> TokenDivergence:
    """Log-probabilities and KL of every token, without a temporary as large as the logits.

    Args:
        logits: policy logits, float32, bfloat16, float16 or float64; any strides.
        ref_logits: reference logits, of the same shape and device; constants: they get no gradient. Where the two
            dtypes differ, the narrower logits are copied to the wider dtype.
        labels: int64, aligned: `labels[i]` is the target of `logits[i]` (see `shift_labels`).
        ignore_index: label of rows that contribute exactly 0 to values and gradients, whatever their logits hold.
        temperature: both logits are divided by it.
        softcap: if given, both logits become softcap * tanh(logits / softcap) first.
        kl_direction: "forward" for KL(reference || policy), TDPO's, or "reverse" for KL(policy || reference), that of
            on-policy distillation and of KL-regularised reinforcement learning.
        shard: the slice of the vocabulary that these logits are, where it is sharded over a process group. All ranks of
            the group call, and get the same values; the gradient is of this rank's logits. Logits that are DTensors
            sharded along their last dimension need no `shard`.

    Returns:
        TokenDivergence of the shape of `labels`. A row with q > 0 where p = 0 (reverse: p > 0 where q = 0) has an
        infinite kl.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype, device or range; the message names it.
        IndexError: a label outside [0, V) that is not `ignore_index` (on CUDA a device assertion).
        RuntimeError: another rank of the shard's group failed; the message is that rank's.

    Source: arXiv 2404.11999, sections 3 and 4; the arithmetic is in docs/math.md.
    """
    check_options(ignore_index, temperature, softcap, kl_direction)
    check_shard(shard)
    checks.float_tensor("logits", logits)
    if logits.dim() == 0:
        raise ValueError("logits has no dimensions; (..., vocabulary) is needed")
    checks.float_tensor("ref_logits", ref_logits)
    checks.label_tensor("labels", labels)
    for name, tensor in (("ref_logits", ref_logits), ("labels", labels)):
        if tensor.device != logits.device:
            raise ValueError(f"{name} is on {tensor.device} but logits are on {logits.device}")
    local, dtensor_shard = local_tensors({"logits": logits, "ref_logits": ref_logits}, {"labels": labels}, vocab_dim=-1)
    shard = shard or dtensor_shard
    check_replicated("labels", labels, shard)
    logits, ref_logits, labels = local["logits"], local["ref_logits"], local["labels"]
    vocab_start, vocab_size, group_name = 0, logits.shape[-1], ""
    if shard is not None:
        logits = shard.narrow("logits", logits, -1)
        ref_logits = shard.narrow("ref_logits", ref_logits, -1)
        vocab_start, vocab_size, group_name = shard.start, _UNKNOWN_SIZE, shard.group.group_name
    elif vocab_size == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: the vocabulary is empty")
    dtype = torch.promote_types(logits.dtype, ref_logits.dtype)
    values, _states = torch.ops.tdpo_ext.token_divergence(
        logits.to(dtype),
        ref_logits.to(dtype),
        labels,
        vocab_start=vocab_start,
        vocab_size=vocab_size,
        ignore_index=ignore_index,
        temperature=float(temperature),
        softcap=0.0 if softcap is None else float(softcap),
        reverse_kl=kl_direction == "reverse",
        group_name=group_name,
    )
    return TokenDivergence.unstack(values)


def shift_labels(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Aligns Hugging Face style labels with logits: (..., T) -> (..., T).

    Entry t of the result is the token that position t predicts, labels[..., t + 1]; the last is `ignore_index`.

    Raises:
        TypeError: `labels` is no int64 tensor, or `ignore_index` no integer.
        ValueError: `labels` has no dimension.
    """
    checks.label_tensor("labels", labels)
    checks.integer("ignore_index", ignore_index)
    if labels.dim() == 0:
        raise ValueError("labels has no dimensions; (..., tokens) is needed")
    shifted = torch.full_like(labels, ignore_index)
    shifted[..., :-1] = labels[..., 1:]
    return shifted


# ---- the operator tdpo_ext::token_divergence: values (fields, ...) and the row states that backward needs ----


@torch.library.register_fake("tdpo_ext::token_divergence")
def _(logits, ref_logits, labels, **_options):
    dtype = operators.state_dtype(logits.dtype)
    values = logits.new_empty((operators.TOKEN_VALUES, *labels.shape), dtype=dtype)
    return values, logits.new_empty((*labels.shape, operators.STATE_SIZE), dtype=dtype)


def _row_states(logits: Tensor, ref_logits: Tensor, labels: Tensor, options: RowOptions) -> Tensor:
    """`operators.row_states`. What it says of shapes is a ValueError here in every torch; see csrc/stable.h."""
    for name, tensor, shape in (("ref_logits", ref_logits, logits.shape), ("labels", labels, logits.shape[:-1])):
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)} but {list(shape)} is needed")
    return operators.row_states(logits, ref_logits, labels, options)


@torch.library.impl("tdpo_ext::token_divergence", "default")
def _(
    logits: Tensor,
    ref_logits: Tensor,
    labels: Tensor,
    *,
    vocab_start: int,
    vocab_size: int,
    ignore_index: int,
    temperature: float,
    softcap: float,
    reverse_kl: bool,
    group_name: str,
) -> tuple[Tensor, Tensor]:
    dtype, shard = operators.state_dtype(logits.dtype), None
    if group_name:
        group = dist._resolve_process_group(group_name)  # type: ignore[arg-type]  # its GroupName is a str
        shard = VocabShard(vocab_start, vocab_start + logits.shape[-1], group)
        facts = [
            Fact("rows", labels.numel(), "labels"),
            Fact("labels", digest(labels), "labels"),
            Fact("bytes", dtype.itemsize, "logits"),
            Fact("ignore_index", ignore_index, "ignore_index"),
            Fact("temperature", temperature, "temperature"),
            Fact("softcap", softcap, "softcap"),
            Fact("reverse_kl", reverse_kl, "kl_direction"),
        ]
        _, ranks = shard.agree(labels.device, lambda: (None, facts))
        vocab_size = ranks.vocab_size
    options = RowOptions(vocab_start, vocab_size, ignore_index, temperature, softcap, reverse_kl)
    exchange = Exchange(shard)
    states = exchange.merged_row_states(
        lambda: _row_states(logits, ref_logits, labels, options),
        labels.shape,
        dtype,
        labels.device,
        reverse_kl=reverse_kl,
    )
    exchange.finish(labels.device)
    values = operators.finalize_row_states(states, labels, options)
    return values, states


def _save_for_backward(ctx, inputs, keyword_only_inputs, output) -> None:
    logits, ref_logits, labels = inputs
    _values, states = output
    save(ctx, logits, ref_logits, labels, states)
    ctx.options = RowOptions(**{name: value for name, value in keyword_only_inputs.items() if name != "group_name"})


def _token_divergence_backward(ctx, values_grad: Tensor, _states_grad) -> tuple[Tensor, None, None]:
    logits, ref_logits, labels, states = saved(ctx)
    upstream = TokenDivergence._make(values_grad.to(states.dtype))
    gradient = operators.logit_gradient(
        logits,
        ref_logits,
        labels,
        states,
        logps_grad=upstream.logps,
        kl_grad=upstream.kl,
        options=ctx.options,
    )
    return gradient, None, None


torch.library.register_autograd(
    "tdpo_ext::token_divergence", _token_divergence_backward, setup_context=_save_for_backward
)
