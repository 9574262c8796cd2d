"""The preference loss of a batch: from hidden states, or from logits where a head can't be fused."""

from __future__ import annotations

import abc
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdpo_ext import TokenDivergence, linear_preference_loss, token_divergence
from tdpo_ext.losses import Objective, sees_tokens

from ..models.causal_lm import CausalLM, ResponseRows
from ..models.forward import patch_forward
from ..models.routers import router_loss
from ..models.sharding import gather_without_forward, use_head_without_its_forward
from ..reference.cached_states import CachedStates
from ..reference.reference import Reference
from .objectives import TrainedObjective


class PreferenceOutput(NamedTuple):
    """What the loss gives for a batch of pairs.

    Attributes:
        loss: the mean over pairs, plus the weighted load-balancing loss where there is one.
        chosen, rejected: sums over each sequence's response tokens, (pairs,), detached.
        router_loss: the load-balancing loss of a mixture of experts, before its coefficient, detached; or None.
    """

    loss: Tensor
    chosen: TokenDivergence
    rejected: TokenDivergence
    router_loss: Tensor | None = None


@dataclass(eq=False)
class PreferenceLoss(abc.ABC):
    """The loss of a batch from `PreferenceCollator`.

    Args:
        policy, reference: the models; the reference is None where the objective needs none and none was given. Its
            values are NaN then.
        objective: the pairwise loss.
        kl_direction: of the KL that it sees.
        router_coefficient: weight of the load-balancing loss that is added for a mixture of experts.
    """

    policy: CausalLM
    reference: Reference | None
    objective: Objective
    kl_direction: str = "forward"
    router_coefficient: float = 0.0

    def __call__(self, batch: dict[str, Any]) -> PreferenceOutput:
        options = {"output_router_logits": True} if self.router_coefficient > 0 else {}
        # First: AtStart exchanges parameters in place.
        ref_rows = None if self.reference is None else self.reference.rows(batch, self._read)
        rows, router_logits = self._read(self.policy, batch, **options)
        output = self._compare(rows, ref_rows, batch)
        if not options:
            return output
        balance = router_loss(self.policy.model, router_logits, _token_mask(batch)).to(output.loss.device)
        return output._replace(loss=output.loss + self.router_coefficient * balance, router_loss=balance.detach())

    def run(self, wrapper: nn.Module, batch: dict[str, Any]) -> PreferenceOutput:
        """The loss of a batch in the forward pass of the policy as an engine has wrapped it."""
        use_head_without_its_forward(self.policy.model)
        patch_forward(self.policy.model, self)  # which a later trainer may have given its own loss
        if self.reference is not None:
            batch = self.reference.read_ahead(wrapper, batch, self._read)
        return wrapper(preference=batch)

    def of_pairs(self, output: PreferenceOutput) -> Tensor:
        """The loss of each pair of a batch, (B,). A per-token objective has none: every pair gets the batch's mean."""
        if sees_tokens(self.objective):
            return output.loss.expand(len(output.chosen.tokens))
        losses = self.objective(output.chosen, output.rejected)
        if output.router_loss is not None:  # the mean has it, the objective's values do not
            losses = losses + self.router_coefficient * output.router_loss
        return losses

    @staticmethod
    @abc.abstractmethod
    def _read(model: CausalLM, batch: dict[str, Any], **options: bool) -> ResponseRows:
        """The hidden states or logits that the loss needs from a model."""

    @abc.abstractmethod
    def _compare(self, rows: Tensor, ref_rows: Tensor | None, batch: dict[str, Any]) -> PreferenceOutput:
        """The output for the policy's and the reference's hidden states or logits at the response tokens."""


@dataclass(eq=False)
class FusedLoss(PreferenceLoss):
    """From hidden states; logits exist only in parts. `logits_budget`: as in `tdpo_ext.linear_preference_loss`."""

    logits_budget: int | None = None
    _read = staticmethod(CausalLM.hidden_rows)  # type: ignore[assignment]

    def _compare(self, hidden: Tensor, ref_hidden: Tensor | None, batch: dict[str, Any]) -> PreferenceOutput:
        policy, device_type = self.policy, hidden.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden.dtype
        gather_without_forward(policy.model.get_output_embeddings())

        def of_reference(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype)

        reference = self.reference
        head = policy.head
        with nullcontext() if reference is None else reference.whole_head() as ref_head:
            loss, chosen, rejected = linear_preference_loss(
                self.objective,
                hidden=hidden.to(dtype),
                weight=[weight.to(dtype) for weight in head.weights],
                ref_hidden=None if ref_hidden is None else of_reference(ref_hidden),
                ref_weight=None if ref_head is None else list(map(of_reference, ref_head.weights)),
                labels=batch["targets"],
                cu_seqlens=batch["cu_seqlens"],
                row_lengths=batch.get("row_lengths"),
                bias=None if head.bias is None else head.bias.to(dtype),
                ref_bias=None if ref_head is None or ref_head.bias is None else of_reference(ref_head.bias),
                token_columns=batch.get("token_columns"),
                softcap=policy.softcap,
                logit_scale=policy.logit_scale,
                ref_logit_scale=1.0 if reference is None else reference.logit_scale,
                kl_direction=self.kl_direction,
                logits_budget=self.logits_budget,
            )
        return PreferenceOutput(loss, chosen, rejected)


@dataclass(eq=False)
class LogitsLoss(PreferenceLoss):
    """From the models' own logits, whole."""

    _read = staticmethod(CausalLM.logit_rows)  # type: ignore[assignment]

    def _compare(self, logits: Tensor, ref_logits: Tensor | None, batch: dict[str, Any]) -> PreferenceOutput:
        beside = logits.detach() if ref_logits is None else ref_logits.to(logits.dtype)
        tokens = token_divergence(logits, beside, batch["targets"], kl_direction=self.kl_direction)
        if ref_logits is None:
            nothing = torch.full_like(tokens.kl, torch.nan)
            tokens = tokens._replace(ref_logps=nothing, kl=nothing)
        lengths = batch["cu_seqlens"].diff()
        sequences = TokenDivergence._make(
            torch.segment_reduce(values, "sum", lengths=lengths, initial=0) for values in tokens
        )
        chosen, rejected = sequences.chunk(2)
        return PreferenceOutput(self.objective(chosen, rejected).mean(), chosen.detach(), rejected.detach())


def why_not_fused(policy: CausalLM, reference: Reference | None) -> str | None:
    """Why logits must be materialised; None if `FusedLoss` can be used."""
    if reference is None:
        return policy.fallback_reason
    reason = policy.fallback_reason or reference.fallback_reason
    if reason is None and policy.softcap != reference.softcap:
        reason = "policy and reference cap their logits differently"
    return reason


def choose_loss(
    policy: CausalLM,
    reference: Reference | None,
    trained: TrainedObjective,
    *,
    router_coefficient: float,
    logits_budget: int | None,
) -> PreferenceLoss:
    """A FusedLoss, or with a warning a LogitsLoss.

    Raises:
        ValueError: the fused loss is needed, and can't be used.
    """
    shared = (policy, reference, trained.objective, trained.kl_direction, router_coefficient)
    reason = why_not_fused(policy, reference)
    if reason is None:
        return FusedLoss(*shared, logits_budget=logits_budget)
    if sees_tokens(trained.objective):
        raise ValueError(f"a loss on tokens needs the fused loss, which can't be used: {reason}")
    if isinstance(reference, CachedStates):
        raise ValueError(f"precompute_reference needs the fused loss, which can't be used: {reason}")
    warnings.warn(f"the fused loss can't be used, logits are materialised instead: {reason}", stacklevel=5)
    return LogitsLoss(*shared)


def _token_mask(batch: dict[str, Any]) -> Tensor | None:
    """1 at tokens and 0 at padding, (B, T); None where nothing is padded."""
    if "segments" in batch:
        return (batch["segments"] >= 0).long()
    return batch.get("attention_mask")
