"""The frozen reference of a training, in one of its forms, and the loss that compares the policy with it."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from ..data.collator import PreferenceCollator
from ..data.tokenize import padding_token
from ..loss.objectives import TrainedObjective
from ..loss.preference_loss import PreferenceLoss
from ..models.causal_lm import CachedReferenceHead, CausalLM, unwrap_peft
from ..models.routers import router_coefficient
from ..models.sharding import is_sharded, is_tensor_parallel, keep_quantized_weights_unpacked, prepare_reference
from .cache import cache_reference

if TYPE_CHECKING:
    from ..trainer import TDPOTrainer


def set_up_loss(trainer: TDPOTrainer, ref_model: nn.Module | None, trained: TrainedObjective) -> PreferenceLoss:
    """The loss of a trainer, with its reference, which becomes the trainer's `ref_model` where it is a second model.

    Raises:
        ValueError: policy, reference, data and options don't fit together; the message names what.
    """
    keep_quantized_weights_unpacked(trainer.model)  # before anything is evaluated
    args, policy = trainer.args, CausalLM.of(trainer.model)
    reference = _find_reference(trainer, policy, ref_model)
    coefficient = router_coefficient(policy.model, args.router_aux_loss_coef)
    shared = _share_prompts(trainer, policy, reference, routed=coefficient > 0)
    if args.padding_free and not shared and not policy.isolates_packed_sequences():
        raise ValueError(
            "padding_free is True, but this model lets packed sequences attend to each other (with attention "
            f"{trainer.model.config._attn_implementation!r}); choose another attn_implementation, or padding"
        )
    if policy.vocab_size != reference.vocab_size:
        raise ValueError(f"ref_model has a vocabulary of {reference.vocab_size} but model has {policy.vocab_size}")
    wrapper = None
    if isinstance(reference, CausalLM) and reference is not policy:  # a second model, probed before it is sharded
        trainer.ref_model, wrapper = prepare_reference(trainer, reference.model)
        reference = replace(reference, model=trainer.ref_model)
    loss = PreferenceLoss(
        policy,
        reference,
        trained.objective,
        kl_direction=trained.kl_direction,
        logits_budget=args.logits_budget,
        without_adapters=trainer.model.disable_adapter if reference is policy else contextlib.nullcontext,
        router_coefficient=coefficient,
        reference_wrapper=wrapper,
    )
    if loss.fallback_reason is not None:
        if args.precompute_reference:
            raise ValueError(f"precompute_reference needs the fused loss, which can't be used: {loss.fallback_reason}")
        warnings.warn(
            f"the fused loss can't be used, logits are materialised instead: {loss.fallback_reason}", stacklevel=4
        )
    return loss


def _share_prompts(
    trainer: TDPOTrainer, policy: CausalLM, reference: CausalLM | CachedReferenceHead, *, routed: bool
) -> bool:
    """Whether a pair's prompt goes through the models once, which the collator is then told."""
    wanted, collator = trainer.args.shared_prompts, trainer.data_collator
    if wanted == "never" or not isinstance(collator, PreferenceCollator):
        return False
    if routed and wanted == "auto":  # a prompt's routing counts once for each response, as it does in TRL
        return False
    mixing = [
        f"{name} mixes responses to one prompt (with attention {model.model.config._attn_implementation!r})"
        for name, model in {"model": policy, "ref_model": reference}.items()
        if isinstance(model, CausalLM) and not model.keeps_branches_apart()
    ]
    if not mixing:
        trainer.data_collator = replace(collator, shared_prompts=True)
    elif wanted == "always":
        raise ValueError(f"shared_prompts is 'always', but {mixing[0]}")
    return not mixing


def _find_reference(
    trainer: TDPOTrainer, policy: CausalLM, ref_model: nn.Module | None
) -> CausalLM | CachedReferenceHead:
    """The reference: a cache and a head, the policy itself (to be run without its adapters), or a second model."""
    if trainer.args.precompute_reference:
        return _cache_splits(trainer, trainer.model if ref_model is None else ref_model)
    if ref_model is None and hasattr(trainer.model, "disable_adapter"):
        return policy
    ref_model = _copy_of(trainer.model) if ref_model is None else ref_model
    if not is_sharded(ref_model):
        ref_model = ref_model.to(trainer.args.device)
    return CausalLM.of(ref_model)


def _copy_of(model: Any) -> nn.Module:
    """The policy as it starts, once more: copied, or loaded again where its weights are spread over processes."""
    tensor_parallel = is_tensor_parallel(model)
    if not tensor_parallel and not is_sharded(model):
        return copy.deepcopy(model)
    name = getattr(model.config, "_name_or_path", "")
    if not name:
        raise ValueError(
            "ref_model is None, but the policy's weights are spread over processes and have no name: give one"
        )
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": model.dtype, "attn_implementation": model.config._attn_implementation}
    if tensor_parallel:
        options["tp_plan"] = "auto"
    return AutoModelForCausalLM.from_pretrained(name, **options)


def _cache_splits(trainer: TDPOTrainer, model: Any) -> CachedReferenceHead:
    """Fills or opens the cache of every split; of the reference only the head is kept."""
    args = trainer.args
    if isinstance(trainer.eval_dataset, dict) and "train" in trainer.eval_dataset:
        raise ValueError("eval_dataset has a split 'train', the name of the training data's cache; rename it")
    if is_sharded(unwrap_peft(model)):
        raise ValueError(
            "precompute_reference needs the reference's weights whole, but DeepSpeed has partitioned them as they were "
            "loaded: set zero3_init_flag to false, or leave precompute_reference out"
        )
    without_adapters = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
    with without_adapters, args.main_process_first(local=False, desc="caching the reference"):
        model = model.to(args.device)
        for name, split in trainer.splits.items():
            trainer.caches[name] = cache_reference(
                args.reference_folder / name,
                model,
                split,
                padding_token(trainer.processing_class),
                args.reference_dtype,
            )
    return CachedReferenceHead.copy_of(CausalLM.of(model))
