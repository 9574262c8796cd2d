"""From the models and the options to the loss of a training and the layout of its batches."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch import nn

from ..config import TDPOConfig
from ..models.causal_lm import CausalLM
from ..models.probes import choose_layout
from ..models.routers import router_coefficient
from ..models.sharding import will_be_spread
from ..option_checks import check_without_reference
from ..reference.cached_states import CachedStates
from ..reference.choose import Datasets, choose_reference, needs_reference
from ..reference.second_model import SecondModel
from .objectives import TrainedObjective
from .preference_loss import PreferenceLoss, choose_loss


def set_up_loss(
    *,
    model: nn.Module,
    ref_model: nn.Module | None,
    args: TDPOConfig,
    trained: TrainedObjective,
    collator: Any,
    datasets: Datasets,
    pad_token_id: int,
    accelerator: Accelerator,
) -> tuple[PreferenceLoss, Any]:
    """Chooses the reference's form, the layout of batches, and the fused loss or that of logits, by trying the models.

    Args:
        model: the policy with its adapters, as it starts.
        ref_model: the model that the user gave, or None. With None and an objective that reads nothing of a reference,
            there is none.
        collator: a PreferenceCollator, or one of the user's own, which is left as it is.
        datasets, pad_token_id: as in `choose_reference`.

    Returns:
        The loss, which holds the reference if there is one, and the collator, told the layout.

    Raises:
        ValueError: a model doesn't fit the others, the data or the options; the message names what.
    """
    policy = CausalLM.of(model, will_be_spread=will_be_spread(args))
    reference = None
    if needs_reference(trained.objective, ref_model, args):
        reference = choose_reference(policy, model, ref_model, args, datasets, pad_token_id)
    else:
        check_without_reference(args)
    coefficient = router_coefficient(policy, args.router_aux_loss_coef)
    collator = choose_layout(
        collator,
        {"model": policy}
        if reference is None or isinstance(reference, CachedStates)
        else {"model": policy, "ref_model": reference},
        shared_prompts=args.shared_prompts,
        padding_free=args.padding_free,
        routed=coefficient > 0,
        max_length=args.max_length,
    )
    if isinstance(reference, SecondModel):  # probed before it is sharded
        reference = reference.prepared(accelerator)
    loss = choose_loss(policy, reference, trained, router_coefficient=coefficient, logits_budget=args.logits_budget)
    return loss, collator
