"""Which form the frozen reference of a training has."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from datasets import Dataset
from torch import nn

from ..config import TDPOConfig
from ..models.causal_lm import CausalLM, unwrap_peft
from ..models.sharding import is_sharded
from .cache import cache_reference
from .cached_states import CachedStates
from .reference import Reference
from .second_model import SecondModel, copy_of
from .without_adapters import WithoutAdapters


def choose_reference(
    policy: CausalLM,
    model: nn.Module,
    ref_model: nn.Module | None,
    args: TDPOConfig,
    splits: dict[str, Dataset],
    pad_token_id: int,
) -> Reference:
    """The reference of a policy: cached hidden states, the policy without its adapters, or a second model.

    Args:
        policy, model: the policy as it starts, and with its adapters around it.
        ref_model: the model that the user gave, or None.
        splits: tokenized data by name, whose hidden states are cached with `precompute_reference`.
        pad_token_id: pads the batches that are read for a cache.

    Raises:
        ValueError: the reference doesn't fit the policy, the data or the options; the message names what.
    """
    reference: Reference
    if args.precompute_reference:
        reference = _cache_splits(model if ref_model is None else ref_model, args, splits, pad_token_id)
    elif ref_model is None and hasattr(model, "disable_adapter"):
        reference = WithoutAdapters(**vars(policy), adapted=model)
    else:
        ref_model = copy_of(model) if ref_model is None else ref_model
        reference = SecondModel.of(ref_model if is_sharded(ref_model) else ref_model.to(args.device))
    if policy.vocab_size != reference.vocab_size:
        raise ValueError(f"ref_model has a vocabulary of {reference.vocab_size} but model has {policy.vocab_size}")
    return reference


def _cache_splits(model: Any, args: TDPOConfig, splits: dict[str, Dataset], pad_token_id: int) -> CachedStates:
    """Fills or opens the cache of every split."""
    if is_sharded(unwrap_peft(model)):
        raise ValueError(
            "precompute_reference needs the reference's weights whole, but DeepSpeed has partitioned them as they were "
            "loaded: set zero3_init_flag to false, or leave precompute_reference out"
        )
    without_adapters = model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext()
    with without_adapters, args.main_process_first(local=False, desc="caching the reference"):
        model = model.to(args.device)
        caches = {
            name: cache_reference(args.reference_folder / name, model, split, pad_token_id, args.reference_dtype)
            for name, split in splits.items()
        }
    return CachedStates.beside(CausalLM.of(model), caches)
