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
from tdpo_ext.losses import Objective, sees_tokens

from ..models.causal_lm import CachedReferenceHead, CausalLM, unwrap_peft
from ..models.routers import router_loss
from ..models.sharding import full_tensor, gathered


class PreferenceOutput(NamedTuple):
    """The mean loss of a batch and, detached, the sums over each sequence's response tokens, (B,), and what was added.

    `router_loss` is the load-balancing loss of a mixture of experts, before its coefficient; None where it has none.
    """

    loss: Tensor
    chosen: TokenDivergence
    rejected: TokenDivergence
    router_loss: Tensor | None = None


class PreferenceLoss:
    """The loss of a batch from `PreferenceCollator`: from hidden states, or from logits where a head can't be fused.

    Args:
        policy, reference: the two models; the same twice where `without_adapters` makes the difference.
        objective: the pairwise loss.
        kl_direction: of the KL that it sees.
        logits_budget: as in `tdpo_ext.linear_preference_loss`.
        without_adapters: a context in which the policy's model is the reference.
        router_coefficient: weight of the load-balancing loss that is added for a mixture of experts.
        reference_wrapper: of the engine that shards the reference, through which it must be called.

    Attributes:
        fallback_reason: why the fused loss can't be used and logits are materialised instead; None if it can.
    """

    def __init__(
        self,
        policy: CausalLM,
        reference: CausalLM | CachedReferenceHead,
        objective: Objective,
        kl_direction: str = "forward",
        logits_budget: int | None = None,
        without_adapters: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        router_coefficient: float = 0.0,
        reference_wrapper: nn.Module | None = None,
    ):
        self.policy, self.reference, self.objective, self.kl_direction = policy, reference, objective, kl_direction
        self.logits_budget, self.without_adapters = logits_budget, without_adapters
        self.router_coefficient, self.reference_wrapper = router_coefficient, reference_wrapper
        if reference_wrapper is not None and isinstance(reference, CausalLM):
            patch_forward(reference.model, lambda batch: self._response_rows(self._outputs(reference, batch), batch))
        self.fallback_reason = policy.fallback_reason or reference.fallback_reason
        if self.fallback_reason is None and policy.softcap != reference.softcap:
            self.fallback_reason = "policy and reference cap their logits differently"
        if self.fallback_reason is not None and sees_tokens(objective):
            raise ValueError(f"a loss on tokens needs the fused loss, which can't be used: {self.fallback_reason}")

    def __call__(self, batch: dict[str, Tensor]) -> PreferenceOutput:
        routed = self.router_coefficient > 0
        outputs = self._outputs(self.policy, batch, **({"output_router_logits": True} if routed else {}))
        rows, ref_rows = self._response_rows(outputs, batch), self._reference_rows(batch)
        if self.fallback_reason is not None:
            output = self._from_logits(rows, ref_rows.to(rows.dtype), batch)
        else:
            output = self._from_hidden(rows, ref_rows, batch)
        if not routed:
            return output
        balance = router_loss(self.policy.model, outputs.router_logits, _token_mask(batch)).to(output.loss.device)
        return output._replace(loss=output.loss + self.router_coefficient * balance, router_loss=balance.detach())

    def _outputs(self, model: CausalLM, batch: dict[str, Tensor], **options: bool) -> Any:
        return (model.backbone if self.fallback_reason is None else model.whole)(batch, **options)

    def _response_rows(self, outputs: Any, batch: dict[str, Tensor]) -> Tensor:
        """The input of the loss at the batch's response positions: hidden states (R, D), or logits (R, V)."""
        values = outputs.last_hidden_state if self.fallback_reason is None else outputs.logits
        return values.flatten(0, 1)[batch["rows"]]

    @torch.no_grad()
    def _reference_rows(self, batch: dict[str, Tensor]) -> Tensor:
        if isinstance(self.reference, CachedReferenceHead):
            return batch["ref_hidden"]
        if self.reference_wrapper is not None:
            return self.reference_wrapper(preference=batch)
        with self.without_adapters():
            return self._response_rows(self._outputs(self.reference, batch), batch)

    def _from_hidden(self, hidden: Tensor, ref_hidden: Tensor, batch: dict[str, Tensor]) -> PreferenceOutput:
        policy, device_type = self.policy, hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        weight, bias = self.reference.weight, self.reference.bias
        sharded = self.reference_wrapper is not None  # over data-parallel ranks, each of which needs the whole
        with gathered(weight, bias) if sharded else contextlib.nullcontext():
            if sharded:
                weight, bias = full_tensor(weight), None if bias is None else full_tensor(bias)
            loss, chosen, rejected = linear_preference_loss(
                self.objective,
                hidden=hidden.to(dtype),
                weight=policy.weight.to(dtype),
                ref_hidden=ref_hidden.to(dtype),
                ref_weight=weight.detach().to(dtype),
                labels=batch["targets"],
                cu_seqlens=batch["cu_seqlens"],
                row_lengths=batch.get("row_lengths"),
                bias=None if policy.bias is None else policy.bias.to(dtype),
                ref_bias=None if bias is None else bias.detach().to(dtype),
                token_columns=batch.get("token_columns"),
                softcap=policy.softcap,
                logit_scale=policy.logit_scale,
                ref_logit_scale=self.reference.logit_scale,
                kl_direction=self.kl_direction,
                logits_budget=self.logits_budget,
            )
        return PreferenceOutput(loss, chosen, rejected)

    def _from_logits(self, logits: Tensor, ref_logits: Tensor, batch: dict[str, Tensor]) -> PreferenceOutput:
        tokens = token_divergence(logits, ref_logits, batch["targets"], kl_direction=self.kl_direction)
        lengths = batch["cu_seqlens"].diff()
        sequences = TokenDivergence._make(
            torch.segment_reduce(values, "sum", lengths=lengths, initial=0) for values in tokens
        )
        chosen, rejected = sequences.chunk(2)
        return PreferenceOutput(self.objective(chosen, rejected).mean(), chosen.detach(), rejected.detach())


def _token_mask(batch: dict[str, Tensor]) -> Tensor | None:
    """1 at tokens and 0 at padding, (B, T); None where nothing is padded."""
    if "segments" in batch:
        return (batch["segments"] >= 0).long()
    return batch.get("attention_mask")


def patch_forward(model: nn.Module, loss: Callable[[dict[str, Tensor]], Any]) -> None:
    """Makes `model(preference=batch)` return `loss(batch)`, whatever wraps the model later."""
    causal_lm = unwrap_peft(model)
    causal_lm._plain_forward, causal_lm._preference_loss = causal_lm.forward, loss  # type: ignore[assignment]
    # A bound method, so that a deep copy of the model forwards through itself.
    causal_lm.forward = MethodType(_forward, causal_lm)


def _forward(self, *args: Any, preference: dict[str, Tensor] | None = None, **kwargs: Any) -> Any:
    if preference is None:
        return self._plain_forward(*args, **kwargs)
    return self._preference_loss(preference)
