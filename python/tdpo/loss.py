"""The preference loss of a batch, computed inside the policy's own forward.

A wrapped policy (DDP, FSDP, DeepSpeed) gathers weights and synchronises gradients around its forward. So the loss, head
included, is computed there: `patch_forward` makes `model(preference=batch)` return the loss and leaves every other call
of the model unchanged.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdpo_ext import TokenDivergence, linear_preference_loss, token_divergence
from tdpo_ext.losses import Objective

from .causal_lm import CachedReferenceHead, CausalLM, unwrap_peft


class PreferenceOutput(NamedTuple):
    """The mean loss of a batch and, detached, the sums over each sequence's response tokens, (B,)."""

    loss: Tensor
    chosen: TokenDivergence
    rejected: TokenDivergence


class PreferenceLoss:
    """The loss of a batch from `PreferenceCollator`: from hidden states, or from logits where a head can't be fused.

    Args:
        policy, reference: the two models; the same twice where `without_adapters` makes the difference.
        objective: the pairwise loss.
        logits_budget: as in `tdpo_ext.linear_preference_loss`.
        without_adapters: a context in which the policy's model is the reference.

    Attributes:
        fallback_reason: why the fused loss can't be used and logits are materialised instead; None if it can.
    """

    def __init__(
        self,
        policy: CausalLM,
        reference: CausalLM | CachedReferenceHead,
        objective: Objective,
        logits_budget: int | None = None,
        without_adapters: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    ):
        self.policy, self.reference, self.objective = policy, reference, objective
        self.logits_budget, self.without_adapters = logits_budget, without_adapters
        self.fallback_reason = policy.fallback_reason or reference.fallback_reason
        if self.fallback_reason is None and policy.softcap != reference.softcap:
            self.fallback_reason = "policy and reference cap their logits differently"

    def __call__(self, batch: dict[str, Tensor]) -> PreferenceOutput:
        rows, ref_rows = self._response_rows(self.policy, batch), self._reference_rows(batch)
        if self.fallback_reason is not None:
            return self._from_logits(rows, ref_rows.to(rows.dtype), batch)
        return self._from_hidden(rows, ref_rows, batch)

    def _response_rows(self, model: CausalLM, batch: dict[str, Tensor]) -> Tensor:
        """The input of the loss at the batch's response positions: hidden states (R, D), or logits (R, V)."""
        values = model.hidden(**batch) if self.fallback_reason is None else model.logits(**batch)
        return values.flatten(0, 1)[batch["rows"]]

    @torch.no_grad()
    def _reference_rows(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.reference, CachedReferenceHead):
            return batch["ref_hidden"]
        with self.without_adapters():
            return self._response_rows(self.reference, batch)

    def _from_hidden(self, hidden: Tensor, ref_hidden: Tensor, batch: dict[str, Tensor]) -> PreferenceOutput:
        policy, ref_weight, ref_bias = self.policy, self.reference.weight.detach(), self.reference.bias
        device_type = hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        loss, chosen, rejected = linear_preference_loss(
            self.objective,
            hidden=hidden.to(dtype),
            weight=policy.weight.to(dtype),
            ref_hidden=ref_hidden.to(dtype),
            ref_weight=ref_weight.to(dtype),
            labels=batch["targets"],
            cu_seqlens=batch["cu_seqlens"],
            row_lengths=batch.get("row_lengths"),
            bias=None if policy.bias is None else policy.bias.to(dtype),
            ref_bias=None if ref_bias is None else ref_bias.detach().to(dtype),
            softcap=policy.softcap,
            logits_budget=self.logits_budget,
        )
        return PreferenceOutput(loss, chosen, rejected)

    def _from_logits(self, logits: Tensor, ref_logits: Tensor, batch: dict[str, Tensor]) -> PreferenceOutput:
        tokens = token_divergence(logits, ref_logits, batch["targets"])
        lengths = batch["cu_seqlens"].diff()
        sequences = TokenDivergence._make(
            torch.segment_reduce(values, "sum", lengths=lengths, initial=0) for values in tokens
        )
        chosen, rejected = sequences.chunk(2)
        return PreferenceOutput(self.objective(chosen, rejected).mean(), chosen.detach(), rejected.detach())


def patch_forward(model: nn.Module, loss: PreferenceLoss) -> None:
    """Makes `model(preference=batch)` return `loss(batch)`, whatever wraps the model later."""
    causal_lm = unwrap_peft(model)
    causal_lm._plain_forward, causal_lm._preference_loss = causal_lm.forward, loss  # type: ignore[assignment]
    # A bound method, so that a deep copy of the model forwards through itself.
    causal_lm.forward = MethodType(_forward, causal_lm)


def _forward(self, *args: Any, preference: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
    if preference is None:
        return self._plain_forward(*args, **kwargs)
    return self._preference_loss(preference)
