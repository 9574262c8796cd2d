"""The load-balancing loss of a mixture of experts, as transformers computes it, with its own coefficient or another."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tdpo_ext import checks

from .causal_lm import CausalLM
from .noise import evaluation_mode


def router_coefficient(policy: CausalLM, wanted: float | None) -> float:
    """The weight of the load-balancing loss: `wanted`, or with None what the model's configuration says; 0 without one.

    Raises:
        ValueError: a coefficient is given for a model without routers, or one is not 0 for a model that does not say
            how to compute the loss.
    """
    model, config = policy.model, policy.model.config.get_text_config()
    if wanted is not None:
        checks.real("router_aux_loss_coef", wanted, least=0)
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if wanted is None else wanted
    if not coefficient:
        return 0.0
    if not hasattr(config, "output_router_logits") or not _routes(policy.probe):
        if wanted is None:
            return 0.0
        raise ValueError(
            f"router_aux_loss_coef is {wanted}, but {type(model).__name__} is no mixture of experts that returns its "
            "router logits: leave it unset"
        )
    if _function_of(model) is None or not hasattr(model, "num_experts_per_tok"):
        raise ValueError(
            f"router_aux_loss_coef is {coefficient}, but {type(model).__name__} does not tell how to compute the "
            "load-balancing loss; set router_aux_loss_coef to 0 to train without it"
        )
    return float(coefficient)


def router_loss(model: Any, router_logits: tuple[Tensor, ...], mask: Tensor | None) -> Tensor:
    """The load-balancing loss of a batch, a scalar.

    Args:
        model: whose `router_coefficient` is not 0.
        router_logits: of every layer, (B T, experts).
        mask: (B, T), 0 at padding; None if there is none.
    """
    return _function_of(model)(router_logits, model.num_experts, model.num_experts_per_tok, mask)


def _routes(model: CausalLM) -> bool:
    """Whether a model gives router logits for a few tokens: a dense one may be of a class that also has experts."""
    batch = model.first_tokens(2)
    batch["rows"] = torch.zeros_like(batch["input_ids"][0])
    read = model.hidden_rows if model.fallback_reason is None else model.logit_rows
    with evaluation_mode(model.model), torch.no_grad():
        try:
            return bool(read(batch, output_router_logits=True).router_logits)
        except LookupError:  # the model's own loss of no router logits
            return False


def _function_of(model: PreTrainedModel) -> Any:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
