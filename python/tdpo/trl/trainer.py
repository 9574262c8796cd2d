"""TRL's DPOTrainer with the TDPO losses, on the fused kernels.

    from tdpo.trl import TDPOTrainer
    TDPOTrainer(model, args=DPOConfig(...), alpha=0.5, variant="tdpo2", train_dataset=..., processing_class=...).train()

Data, collation, configuration, logging and the reference are TRL's; `beta` is that of its DPOConfig. Needs TRL 1.16.
Every option of DPOConfig does what TRL says, or is refused by name (`REFUSED`). `rewards/*`, `logps/*`, `entropy`,
`num_tokens` and `mean_token_accuracy` mean what they mean in TRL; `logits/*` are not logged (see `tdpo.loss.metrics`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import create_model_from_path

from ..data.collator import predicted_responses
from ..loss.metrics import MetricMeans, preference_metrics
from ..loss.preference_loss import FusedLoss, why_not_fused
from ..models.causal_lm import CausalLM
from ..models.forward import patch_forward
from ..models.routers import router_coefficient
from ..models.sharding import is_sharded, keep_quantized_weights_unpacked
from ..precision import WarnOfCoarseWeights, autocast
from ..reference.reference import Reference
from ..reference.second_model import SecondModel, ShardedModel
from ..reference.without_adapters import WithoutAdapters
from .losses import trl_objective

# Options that have no meaning for these losses, and the values that leave them unused.
REFUSED: dict[str, tuple[Any, ...]] = {
    "f_divergence_type": ("reverse_kl",),
    "f_alpha_divergence_coef": (0.5,),
    "label_smoothing_factor": (0.0,),
    "ld_alpha": (None,),
    "use_weighting": (False,),
    "precompute_ref_log_probs": (False,),  # log-probabilities of the labels alone give no KL
    "precompute_ref_batch_size": (None,),
    "padding_free": (False,),  # TRL 1.16 ignores it
}


class TDPOTrainer(DPOTrainer):
    """TRL's DPOTrainer, the loss "sigmoid" of its `loss_type` replaced by TDPO's: `tdpo.trl.TDPOTrainer`.

    `tdpo.TDPOTrainer` is another class, which needs no TRL.

    Args:
        model, ref_model: loaded, or the name of a folder or of a hub's model.
        alpha, variant: as in `tdpo_ext.tdpo_loss`; the variant "dpo" is `tdpo_ext.dpo_loss`, and so TRL's own.
        others: DPOTrainer's.

    Raises:
        ValueError: a DPOConfig option that has no meaning for TDPO, a loss that couples pairs, a bad `alpha` or
            `variant`, `compute_metrics` (no logits are formed), or a model whose head can't be fused.
        TypeError: a processor of images: only text is supported.
    """

    args: DPOConfig
    model: PreTrainedModel
    data_collator: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *positional: Any,
        alpha: float = 0.5,
        variant: str = "tdpo2",
        **others: Any,
    ) -> None:
        if args is not None:
            _check_options(args)
            trl_objective(args, alpha=alpha, variant=variant)  # refuses what it can't be, before models are loaded
        if others.get("compute_metrics") is not None:
            raise ValueError("compute_metrics is given, but no logits are formed that it could work on: leave it out")
        if isinstance(others.get("processing_class"), ProcessorMixin):
            raise TypeError("processing_class is a processor of images; only text is supported: give its tokenizer")
        if isinstance(ref_model, str):
            ref_model = _load_reference(ref_model, model, args)
        super().__init__(model, ref_model, args, *positional, **others)
        if self._is_vlm:
            raise TypeError("model is a vision model; only text is supported: give processing_class=its tokenizer")
        keep_quantized_weights_unpacked(self.model)  # before anything is evaluated
        self.add_callback(WarnOfCoarseWeights())
        with autocast(self.args):
            policy = CausalLM.of(self.model)
            reference = self._reference(policy)
        reason = why_not_fused(policy, reference)
        if reason is not None:
            raise ValueError(f"the fused loss can't be used: {reason}")
        self._tdpo = FusedLoss(
            policy,
            reference,
            trl_objective(self.args, alpha=alpha, variant=variant),
            router_coefficient=router_coefficient(policy, self.args.router_aux_loss_coef),
        )
        patch_forward(self.model, self._tdpo)
        self.data_collator = _WithResponseRows(self.data_collator)
        self._means = {mode: MetricMeans(self.accelerator) for mode in ("train", "eval")}
        self._new_tokens = 0

    def _reference(self, policy: CausalLM) -> Reference:
        """TRL's reference, in its form for our loss."""
        if self.ref_model is None:
            return WithoutAdapters(**vars(policy), adapted=self.model)
        reference = SecondModel.of(self.accelerator.unwrap_model(self.ref_model))
        sharded = is_sharded(reference.model)
        return ShardedModel(**vars(reference), wrapper=self.ref_model) if sharded else reference

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        output = model(preference=inputs)
        self._means[self._mode].add(preference_metrics(output, self.beta))
        if self.model.training:
            self._new_tokens += inputs["num_tokens"]
        return (output.loss, {}) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, which TRL then logs as its own."""
        means = self._means[self._mode].take()
        if means:
            new, self._new_tokens = self._new_tokens, 0
            counted = self.accelerator.reduce(torch.tensor(new, device=self.accelerator.device), "sum")
            self._total_train_tokens += int(counted) // self._tp_size
            means["num_tokens"] = self._total_train_tokens
        self._metrics[self._mode].update({name: [mean] for name, mean in means.items()})
        super().log(logs, start_time)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self._compute_loss(model, inputs, return_outputs=False)
        return loss.detach(), None, None


def _check_options(args: DPOConfig) -> None:
    for name, unused in REFUSED.items():
        value = getattr(args, name)
        if value not in unused:
            raise ValueError(f"{name} is {value!r}; it has no meaning for TDPO: leave it at {unused[0]!r}")


def _load_reference(name: str, policy: Any, args: DPOConfig | None) -> nn.Module:
    """The reference `name`, loaded as TRL loads the one it makes itself: like the policy."""
    given = None if args is None else args.model_init_kwargs
    options: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    options.setdefault("trust_remote_code", bool(args and args.trust_remote_code))
    if not isinstance(policy, str):
        options.setdefault("dtype", policy.dtype)
        options.setdefault("attn_implementation", policy.config._attn_implementation)
    return create_model_from_path(name, **options)


@dataclass
class _WithResponseRows:
    """TRL's padded batches, and beside them what `PreferenceCollator` says of response tokens, found on the host."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collate(examples)
        input_ids = batch["input_ids"]
        sequences, length = input_ids.shape
        responses = predicted_responses(
            input_ids, batch["completion_mask"].bool(), torch.arange(sequences, device=input_ids.device) * length
        )
        lengths = {"row_lengths": responses["cu_seqlens"].diff().tolist()}
        return {**batch, **responses, **lengths, "num_tokens": int(batch["attention_mask"].sum())}
