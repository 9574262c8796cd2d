"""TRL's DPOTrainer with the TDPO losses, on the fused kernels.

    from tdpo.trl import TDPOTrainer
    TDPOTrainer(model, args=DPOConfig(...), alpha=0.5, variant="tdpo2", train_dataset=..., processing_class=...).train()

Data, collation, configuration, logging and the reference are TRL's; `beta` is that of its DPOConfig. Needs TRL 1.16.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch
from torch import Tensor, nn
from trl import DPOTrainer

from tdpo_ext import tdpo_loss
from tdpo_ext.losses import check_tdpo_options

from .causal_lm import CausalLM
from .collator import predicted_responses
from .loss import PreferenceLoss, patch_forward
from .metrics import MetricMeans, preference_metrics

_UNSUPPORTED_OPTIONS = ("precompute_ref_log_probs", "use_weighting", "ld_alpha")


class TDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer, its loss replaced by TDPO's.

    Args:
        alpha, variant: as in `tdpo_ext.tdpo_loss`.
        others: DPOTrainer's.

    Raises:
        ValueError: a DPOConfig option that has no meaning for TDPO, a bad `alpha` or `variant`, or a model whose head
            can't be fused.
    """

    def __init__(self, *positional: Any, alpha: float = 0.5, variant: str = "tdpo2", **others: Any) -> None:
        super().__init__(*positional, **others)
        check_tdpo_options(self.beta, alpha, variant)
        if self.loss_types != ["sigmoid"]:
            raise ValueError(f"loss_type is {self.loss_types}; it must be 'sigmoid', which TDPO replaces")
        for name in _UNSUPPORTED_OPTIONS:
            if getattr(self.args, name, None):
                raise ValueError(f"{name} is {getattr(self.args, name)}; it has no meaning for TDPO: leave it unset")
        policy = reference = CausalLM.of(self.model)
        if self.ref_model is not None:
            reference = CausalLM.of(self.accelerator.unwrap_model(self.ref_model))
        self._tdpo = PreferenceLoss(
            policy,
            reference,
            functools.partial(tdpo_loss, beta=self.beta, alpha=alpha, variant=variant),
            without_adapters=self.model.disable_adapter if self.ref_model is None else contextlib.nullcontext,
        )
        if self._tdpo.fallback_reason is not None:
            raise ValueError(f"the fused loss can't be used: {self._tdpo.fallback_reason}")
        patch_forward(self.model, self._tdpo)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool) -> Any:
        mode = "train" if self.model.training else "eval"
        output = model(preference=_preference_batch(inputs))
        means = MetricMeans(self.accelerator)
        means.add(preference_metrics(output, self.beta))
        for name, mean in means.take().items():
            self._metrics[mode][name].append(mean)
        return (output.loss, {}) if return_outputs else output.loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self._compute_loss(model, inputs, return_outputs=False)
        return loss.detach(), None, None


def _preference_batch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """TRL's padded batch in the form of `PreferenceCollator`'s."""
    input_ids = inputs["input_ids"]
    sequences, length = input_ids.shape
    starts = torch.arange(sequences, device=input_ids.device) * length
    return {
        "input_ids": input_ids,
        "attention_mask": inputs["attention_mask"],
        **predicted_responses(input_ids, inputs["completion_mask"].bool(), starts),
    }
