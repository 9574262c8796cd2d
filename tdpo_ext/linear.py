"""The fused losses: from hidden states and LM-head weights to values and gradients, without the logits."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .divergence import TokenDivergence, check_options
from .heads import Heads, Options
from .losses import check_loss_options, tdpo_loss
from .plan import Costs, budget_or_default, make_plan, streaming_plan
from .resident import resident_loss
from .rows import Rows, packed_rows, padded_rows
from .shard import VocabShard, local_parts
from .streaming import streamed_divergence

Objective = Callable[[TokenDivergence, TokenDivergence], Tensor]


@torch.compiler.disable
def linear_token_divergence(
    hidden: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (..., D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    labels: Tensor,  # (...)
    *,
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
) -> TokenDivergence:
    """`token_divergence` of `hidden @ weight.T + bias`, the logits never existing as a whole.

    Differentiable in hidden, weight and bias; the reference gets no gradient. The vocabulary is streamed in slices and
    recomputed in backward (docs/math.md, "streaming"). Logits are float32 even where the inputs are bfloat16 or
    float16. Under autocast, inputs are cast as `torch.nn.functional.linear` casts them.

    Args:
        hidden, weight, bias: the policy's hidden states and LM head, of one dtype.
        ref_hidden, ref_weight, ref_bias: the reference's, whose width may differ.
        labels: int64, aligned with `hidden` (see `shift_labels`).
        logits_budget: bytes that temporaries may take (default: by device, see `plan.default_budget`). It changes
            memory and time, never results beyond rounding.
        ignore_index, temperature, softcap: as in `token_divergence`.
        shard: the rows of both heads that this rank holds, where the vocabulary is sharded over a process group. All
            ranks of the group call with the same hidden states and labels, and get the same values; gradients of
            weight and bias are this rank's, that of hidden is summed over the group. Heads that are DTensors sharded
            along dimension 0 (torch's tensor parallel) need no `shard`.

    Raises:
        ValueError, TypeError, IndexError: as `token_divergence`; the message names the argument.
        RuntimeError: another rank of the shard's group failed; the message is that rank's.
    """
    call = _prepare(locals(), lambda labels: padded_rows(labels, ignore_index, sequences=1))
    why = "per-token values are differentiable"
    plan = streaming_plan(len(call.rows.index), call.costs, call.budget, why)
    *values, _correct = streamed_divergence(call.heads, call.rows, call.options, plan)
    return TokenDivergence(*(value.view(labels.shape) for value in values))


@torch.compiler.disable
def linear_preference_loss(
    objective: Objective,
    hidden: Tensor,  # (2B, T, D), or packed (N, D)
    weight: Tensor,  # (V, D)
    ref_hidden: Tensor,  # (2B, T, D_ref), or packed (N, D_ref)
    ref_weight: Tensor,  # (V, D_ref)
    labels: Tensor,  # (2B, T), or packed (N,)
    *,
    cu_seqlens: Tensor | None = None,  # (2B + 1,)
    bias: Tensor | None = None,  # (V,)
    ref_bias: Tensor | None = None,  # (V,)
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logits_budget: int | None = None,
    shard: VocabShard | None = None,
    metrics: dict[str, Tensor] | None = None,
) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
    """Mean pairwise preference loss of B pairs from hidden states, with a memory budget instead of logits.

    The first B sequences are the chosen responses, the last B the rejected ones. Prompt, padding and ignored rows never
    reach the head. The planner works on whole pairs at a time where their logits fit the budget: gradients are then
    formed in the forward pass and nothing is recomputed (4 matrix products, 3 with a frozen head). A longer pair is
    streamed over slices of the vocabulary. See docs/math.md.

    Args:
        objective: `objective(chosen, rejected) -> (pairs,)` on per-sequence sums, such as
            `functools.partial(tdpo_loss, beta=0.1)`. It sees any number of pairs at a time and must treat each alone.
        cu_seqlens: for packed rows, int32 or int64 offsets of the 2B sequences (flash-attention's convention).
        metrics: if given, "correct" is put into it: how many tokens of each sequence have the policy's highest
            probability, (2B,).
        others: as in `linear_token_divergence`.

    Returns:
        (loss, chosen, rejected): the scalar mean over pairs, and detached per-sequence sums (B,) for metrics. The loss
        can be differentiated once.

    Raises:
        ValueError, TypeError, IndexError: a bad argument, named in the message; an objective that couples pairs.
    """
    _check_objective(objective, hidden.device)
    call = _prepare(locals(), lambda flat: _pairs_of(labels, flat, ignore_index, cu_seqlens))
    heads, rows, options = call.heads, call.rows, call.options
    plan = make_plan(rows.pair_lengths, call.costs, call.budget, hidden.device)
    if plan.kind == "resident":
        loss, *sums, correct = resident_loss(objective, heads, rows, options, plan)
        chosen, rejected = TokenDivergence(*sums).chunk(2)
    else:
        values = streamed_divergence(heads, rows, options, plan)
        *sums, correct = (rows.sequence_sums(value[rows.index]) for value in values)
        chosen, rejected = TokenDivergence(*sums).chunk(2)
        loss = objective(chosen, rejected).mean()
    if metrics is not None:
        metrics["correct"] = correct.detach()
    return loss, chosen.detach(), rejected.detach()


class LinearTDPOLoss(nn.Module):
    """`linear_preference_loss` with the TDPO objective.

    Args:
        beta, alpha, variant: as in `tdpo_loss`.
        logits_budget, shard, ignore_index, temperature, softcap: as in `linear_token_divergence`.

    Raises:
        ValueError: an option out of range, named in the message.
    """

    def __init__(
        self,
        beta: float = 0.1,
        alpha: float = 0.5,
        variant: str = "tdpo2",
        logits_budget: int | None = None,
        shard: VocabShard | None = None,
        *,
        ignore_index: int = -100,
        temperature: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        check_loss_options(beta, alpha, variant)
        check_options(temperature, softcap)
        self.objective = functools.partial(tdpo_loss, beta=beta, alpha=alpha, variant=variant)
        self.options = {
            "logits_budget": logits_budget,
            "shard": shard,
            "ignore_index": ignore_index,
            "temperature": temperature,
            "softcap": softcap,
        }

    def forward(
        self, hidden, weight, ref_hidden, ref_weight, labels, *, bias=None, ref_bias=None, cu_seqlens=None, metrics=None
    ):
        """As `linear_preference_loss`: (loss, chosen, rejected)."""
        return linear_preference_loss(
            self.objective,
            hidden,
            weight,
            ref_hidden,
            ref_weight,
            labels,
            bias=bias,
            ref_bias=ref_bias,
            cu_seqlens=cu_seqlens,
            metrics=metrics,
            **self.options,
        )


@dataclass(frozen=True)
class _Call:
    """A public call, checked: flat heads, the rows that reach them, and what the planner wants to know."""

    heads: Heads
    rows: Rows
    options: Options
    costs: Costs
    budget: int


def _prepare(arguments: dict, find_rows: Callable[[Tensor], Rows]) -> _Call:
    """`arguments` are those of the public function; `find_rows` tells the rows from flat labels."""
    names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "labels")
    over_vocabulary = ("weight", "bias", "ref_weight", "ref_bias")
    tensors, shard = local_parts(over_vocabulary, {name: arguments[name] for name in names}, dim=0)
    shard = arguments["shard"] or shard
    device = tensors["hidden"].device

    def check() -> tuple[tuple[Heads, Rows, int, float], dict[str, int]]:
        cap = check_options(arguments["temperature"], arguments["softcap"])
        budget = budget_or_default(arguments["logits_budget"], device)
        local = dict(tensors)
        for name in over_vocabulary:
            if shard is not None and local[name] is not None:
                local[name] = shard.narrow(name, local[name], 0)
        heads = Heads(**local).autocast().check()
        if shard is None and heads.vocab == 0:
            raise ValueError("weight has no rows: the vocabulary is empty")
        flat = heads.flat()
        rows = find_rows(flat.labels)
        facts = {"rows": len(rows.index), "vocab": heads.vocab, "budget": budget, "bytes": heads.weight.dtype.itemsize}
        return (flat, rows, budget, cap), facts

    if shard is None:
        (heads, rows, budget, cap), _ = check()
        widest = vocab_size = heads.vocab
    else:
        (heads, rows, budget, cap), found = shard.agree(device, check)
        shard.check_same(found, {"rows": "labels", "bytes": "weight"})
        # One plan for all ranks: that of the widest shard and the smallest budget.
        widest, budget, vocab_size = max(found["vocab"]), min(found["budget"]), found["vocab_size"][0]
    start = 0 if shard is None else shard.start
    options = Options(arguments["ignore_index"], float(arguments["temperature"]), cap, start, vocab_size, shard)
    return _Call(heads, rows, options, heads.costs(widest), budget)


def _pairs_of(labels: Tensor, flat: Tensor, ignore_index: int, cu_seqlens: Tensor | None) -> Rows:
    if cu_seqlens is not None:
        rows = packed_rows(flat, ignore_index, cu_seqlens)
    elif labels.dim() == 2:
        rows = padded_rows(flat, ignore_index, sequences=labels.shape[0])
    else:
        raise ValueError(f"labels has shape {tuple(labels.shape)}; (2B, T) is needed, or cu_seqlens with (N,)")
    if rows.pairs == 0 or len(rows.lengths) % 2:
        raise ValueError(
            f"labels hold {len(rows.lengths)} sequences; an even, positive number is needed: chosen, then rejected"
        )
    return rows


_found_good: weakref.WeakSet = weakref.WeakSet()


def _check_objective(objective: Objective, device: torch.device) -> None:
    """Tries the objective, once, on two made-up pairs: its losses must be two, and each its own pair's alone."""
    with contextlib.suppress(TypeError):  # what can't be hashed or weakly referenced is tried at every call
        if objective in _found_good:
            return
    with torch.enable_grad():
        made_up = torch.tensor([[-9.0, -7.0], [-8.0, -6.5], [0.3, 0.5], [2.0, 1.5]], device=device)
        sides = [TokenDivergence(*(made_up * scale).unbind()).detach() for scale in (1.0, 1.3)]
        leaves = [value.requires_grad_() for side in sides for value in (side.logps, side.kl)]
        losses = objective(*sides)
        if not isinstance(losses, Tensor) or losses.shape != (2,):
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"objective returned {got} for 2 pairs; a loss per pair, shape (2,), is needed")
        for pair, other in ((0, 1), (1, 0)):
            if not losses.requires_grad:
                break
            grads = torch.autograd.grad(losses[pair], leaves, retain_graph=True, allow_unused=True)
            if any(grad is not None and grad[other] != 0 for grad in grads):
                raise ValueError("objective couples pairs: the loss of one pair depends on another pair's values")
    with contextlib.suppress(TypeError):
        _found_good.add(objective)
