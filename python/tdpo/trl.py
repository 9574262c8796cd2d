"""For users of TRL: its DPOTrainer with the TDPO losses, on the fused kernels.

    from tdpo.trl import TDPOTrainer
    TDPOTrainer(model, args=DPOConfig(...), alpha=0.5, variant="tdpo2", train_dataset=..., processing_class=...).train()

Data, collation, configuration, logging and the reference are TRL's; `beta` is that of its DPOConfig. Needs TRL 1.16.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from trl import DPOTrainer

from tdpo_ext import tdpo_loss
from tdpo_ext.losses import check_loss_options

from .head import LanguageModelHead
from .loss import PreferenceLoss, install
from .metrics import preference_metrics

_TRLS_OWN = ("precompute_ref_log_probs", "use_weighting", "ld_alpha")


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
        check_loss_options(self.beta, alpha, variant)
        if self.loss_types != ["sigmoid"]:
            raise ValueError(f"loss_type is {self.loss_types}; TDPO replaces it: leave it at 'sigmoid'")
        for name in _TRLS_OWN:
            if getattr(self.args, name, None):
                raise ValueError(f"{name} is {getattr(self.args, name)}; TDPO has no use for it")
        policy, bare = LanguageModelHead.of(self.model), self.ref_model is None
        options = {"without_adapters": self.model.disable_adapter} if bare else {}
        self._tdpo = PreferenceLoss(
            policy,
            policy if bare else LanguageModelHead.of(self.accelerator.unwrap_model(self.ref_model)),
            functools.partial(tdpo_loss, beta=self.beta, alpha=alpha, variant=variant),
            **options,
        )
        if self._tdpo.obstacle is not None:
            raise ValueError(f"the fused loss can't be used: {self._tdpo.obstacle}")
        install(self.model, self._tdpo)

    def _compute_loss(self, model, inputs, return_outputs):
        mode = "train" if self.model.training else "eval"
        batch = _batch(inputs)
        output = model(preference=batch)
        for name, (total, weight) in preference_metrics(output, batch["cu_seqlens"].diff(), self.beta).items():
            sums = torch.stack([total.float(), torch.as_tensor(weight, device=total.device).float()])
            total, weight = self.accelerator.reduce(sums, "sum").tolist()
            self._metrics[mode][name].append(total / max(weight, 1e-9))
        return (output.loss, {}) if return_outputs else output.loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self._compute_loss(model, inputs, False)
        return loss.detach(), None, None


def _batch(inputs: dict) -> dict:
    """TRL's padded batch as `PreferenceCollator` makes them."""
    responses = inputs["completion_mask"].bool()
    responses[:, 0] = False  # nothing predicts the first token
    positions = responses.view(-1).nonzero()[:, 0]
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "rows": positions - 1,
        "targets": inputs["input_ids"].view(-1)[positions],
        "cu_seqlens": torch.cat([positions.new_zeros(1), responses.sum(-1).cumsum(0)]),
    }
