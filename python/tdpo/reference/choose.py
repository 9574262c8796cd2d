"""Which form the frozen reference of a training has."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import nn

from tdpo_ext.losses import Objective, is_reference_free

from ..config import TDPOConfig
from ..data.stream import PreferenceStream
from ..models.adapters import has_adapters
from ..models.causal_lm import CausalLM
from ..models.sharding import is_sharded, whole_size, will_be_spread
from ..progress import shows_bars
from .at_start import AtStart
from .cache import ReferenceCache, cache_reference
from .cached_states import CachedStates
from .reference import Reference
from .second_model import SecondModel, copy_of
from .without_adapters import WithoutAdapters, starts_without_adapters

# For training, and for evaluation: one dataset, or several by name. Streams have no cache.
Datasets = tuple["Dataset | PreferenceStream | None", "Dataset | PreferenceStream | dict[str, Any] | None"]


def needs_reference(objective: Objective, ref_model: Any, args: TDPOConfig) -> bool:
    """Whether there is a reference: not where the objective reads nothing of one, and none was asked for."""
    return ref_model is not None or args.precompute_reference or not is_reference_free(objective)


def choose_reference(
    policy: CausalLM,
    model: nn.Module,
    ref_model: nn.Module | None,
    args: TDPOConfig,
    datasets: Datasets,
    pad_token_id: int,
) -> Reference:
    """The reference of a policy: cached hidden states, the policy as it starts, or a second model.

    Args:
        policy, model: the policy as it starts, and with its adapters around it.
        ref_model: the model that the user gave, or None.
        datasets: tokenized data, whose hidden states are cached with `precompute_reference`.
        pad_token_id: pads the batches that are read for a cache.

    Raises:
        ValueError: the reference doesn't fit the policy, the data or the options; the message names what.
    """
    if ref_model is not None and not is_sharded(ref_model):
        ref_model = ref_model.to(args.device)
    start = policy if ref_model is None else CausalLM.of(ref_model, will_be_spread=will_be_spread(args))
    if policy.vocab_size != start.vocab_size:
        raise ValueError(f"ref_model has a vocabulary of {start.vocab_size} but model has {policy.vocab_size}")
    if args.precompute_reference:
        splits = _splits_by_name(*datasets)
        caches = _cache_splits(model if ref_model is None else ref_model, args, splits, pad_token_id)
        return CachedStates.beside(start, caches)
    return policy_at_start(policy, model) if ref_model is None else SecondModel(**vars(start))


def policy_at_start(policy: CausalLM, model: nn.Module) -> Reference:
    """A policy that was not trained yet as the reference of itself, in the form that costs least.

    Args:
        policy, model: the policy, and with its adapters around it.
    """
    if starts_without_adapters(model):
        return WithoutAdapters(**vars(policy), adapted=model)
    if trains_little(model):
        return AtStart.of_policy(policy, model)
    return SecondModel.of(copy_of(model))


def trains_little(model: nn.Module) -> bool:
    """Whether the first values of what trains take less memory than half a copy; always so beside adapters."""
    if has_adapters(model):
        return True
    trained, frozen = (
        sum(whole_size(p) for p in model.parameters() if p.requires_grad == trains) for trains in (True, False)
    )
    return trained < frozen


def _splits_by_name(train_dataset: Any, eval_dataset: Any) -> dict[str, Dataset]:
    """The training data as "train", the evaluation data as "eval" or under the names of its splits."""
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    if "train" in evals:
        raise ValueError("eval_dataset has a split 'train', the name of the training data's cache; rename it")
    return {name: split for name, split in {"train": train_dataset, **evals}.items() if split is not None}


def _cache_splits(
    model: Any, args: TDPOConfig, splits: dict[str, Dataset], pad_token_id: int
) -> list[tuple[Dataset, ReferenceCache]]:
    """Fills or opens the cache of every split."""
    if is_sharded(model):
        raise ValueError(
            "precompute_reference needs the reference's weights whole, but DeepSpeed has partitioned them as they were "
            "loaded: set zero3_init_flag to false, or leave precompute_reference out"
        )
    with args.main_process_first(local=False, desc="caching the reference"):
        model = model.to(args.device)
        dtype, bars = args.reference_dtype, shows_bars(args)
        return [
            (split, cache_reference(args.reference_folder / name, model, split, pad_token_id, dtype, progress=bars))
            for name, split in splits.items()
        ]
