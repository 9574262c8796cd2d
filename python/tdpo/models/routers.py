"""The load-balancing loss of a mixture of experts, as transformers computes it, with its own coefficient or another."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tdpo_ext import checks


def router_coefficient(model: PreTrainedModel, wanted: float | None) -> float:
    """The weight of the load-balancing loss: `wanted`, or with None what the model's configuration says; 0 without one.

    Raises:
        ValueError: a coefficient is given for a model without routers, or one is not 0 for a model that does not say
            how to compute the loss.
    """
    config = model.config.get_text_config()
    routed = hasattr(config, "output_router_logits")
    if wanted is not None:
        checks.real("router_aux_loss_coef", wanted, least=0)
    if wanted and not routed:
        raise ValueError(
            f"router_aux_loss_coef is {wanted}, but {type(model).__name__} is no mixture of experts that returns its "
            "router logits: leave it unset"
        )
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) if wanted is None else wanted
    if not routed or not coefficient:
        return 0.0
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


def _function_of(model: PreTrainedModel) -> Any:
    return getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
