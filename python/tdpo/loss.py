"""The preference loss of a batch, computed inside the policy's own forward.

A wrapped policy (DDP, FSDP, DeepSpeed) gathers weights and synchronises gradients around its forward. So the loss, head
included, is computed there: `install` gives the model's forward a second way in, and `model(preference=batch)` returns
the loss. Everything else about the model stays as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import MethodType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tdpo_ext import TokenDivergence, linear_preference_loss, token_divergence

from .data import IGNORE_INDEX
from .head import FrozenHead, LanguageModelHead, unwrapped


class PreferenceOutput(NamedTuple):
    """The mean loss of a batch and, detached, per-sequence sums: of divergences (B,) and of correct tokens (2B,)."""

    loss: Tensor
    chosen: TokenDivergence
    rejected: TokenDivergence
    correct: Tensor


class PreferenceLoss:
    """The loss of a batch from `PreferenceCollator`, from hidden states, or from logits where a head can't be fused.

    Args:
        policy, reference: the two models' heads; the same twice where `without_adapters` makes the difference.
        objective: the pairwise loss.
        logits_budget: as in `tdpo_ext.linear_preference_loss`.
        without_adapters: a context in which the policy's model is the reference.

    Attributes:
        obstacle: why the fused loss can't be used; None if it can.
    """

    def __init__(
        self,
        policy: LanguageModelHead,
        reference: LanguageModelHead | FrozenHead,
        objective: Callable[[TokenDivergence, TokenDivergence], Tensor],
        logits_budget: int | None = None,
        without_adapters: Callable = contextlib.nullcontext,
    ):
        self.policy, self.reference, self.objective = policy, reference, objective
        self.logits_budget, self.without_adapters = logits_budget, without_adapters
        self.obstacle = policy.obstacle or reference.obstacle
        if self.obstacle is None and policy.softcap != reference.softcap:
            self.obstacle = "policy and reference cap their logits differently"

    def __call__(self, batch: dict[str, Tensor]) -> PreferenceOutput:
        rows, reference = self._rows_of(self.policy, batch), self._reference_rows(batch)
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        if self.obstacle is not None:
            return self._from_logits(rows, reference.to(rows.dtype), batch)
        policy, ref_weight, ref_bias = self.policy, self.reference.weight.detach(), self.reference.bias
        metrics: dict[str, Tensor] = {}
        loss, chosen, rejected = linear_preference_loss(
            *(self.objective, rows.to(dtype), policy.weight.to(dtype), reference.to(dtype), ref_weight.to(dtype)),
            batch["targets"],
            cu_seqlens=batch["cu_seqlens"],
            bias=None if policy.bias is None else policy.bias.to(dtype),
            ref_bias=None if ref_bias is None else ref_bias.detach().to(dtype),
            ignore_index=IGNORE_INDEX,
            softcap=policy.softcap,
            logits_budget=self.logits_budget,
            metrics=metrics,
        )
        return PreferenceOutput(loss, chosen, rejected, metrics["correct"])

    def _rows_of(self, head: LanguageModelHead, batch: dict[str, Tensor]) -> Tensor:
        """What the loss reads of a model at the batch's response positions: hidden states (R, D), or logits (R, V)."""
        values = head.hidden(**batch) if self.obstacle is None else head.logits(**batch)
        return values.flatten(0, 1)[batch["rows"]]

    @torch.no_grad()
    def _reference_rows(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.reference, FrozenHead):
            return batch["ref_hidden"]
        with self.without_adapters():
            return self._rows_of(self.reference, batch)

    def _from_logits(self, logits: Tensor, ref_logits: Tensor, batch: dict[str, Tensor]) -> PreferenceOutput:
        targets, lengths = batch["targets"], batch["cu_seqlens"].diff()
        values = token_divergence(logits, ref_logits, targets, ignore_index=IGNORE_INDEX)
        correct = (logits.detach().argmax(-1) == targets).to(values.kl.dtype)
        *sums, right = (torch.segment_reduce(v, "sum", lengths=lengths, initial=0) for v in (*values, correct))
        chosen, rejected = TokenDivergence(*sums).chunk(2)
        return PreferenceOutput(self.objective(chosen, rejected).mean(), chosen.detach(), rejected.detach(), right)


def install(model: nn.Module, loss: PreferenceLoss) -> None:
    """Lets `model(preference=batch)` return `loss(batch)`, whatever wraps the model later."""
    core = unwrapped(model)
    core._plain_forward, core._preference_loss = core.forward, loss  # type: ignore[assignment]
    # A bound method, so that a deep copy of the model forwards through itself.
    core.forward = MethodType(_forward, core)


def _forward(self, *args, preference: dict[str, Tensor] | None = None, **kwargs):
    if preference is None:
        return self._plain_forward(*args, **kwargs)
    return self._preference_loss(preference)
