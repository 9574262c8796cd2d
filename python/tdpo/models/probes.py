"""What a model does with batches that are laid out otherwise than each sequence alone, tried on a few tokens."""

from __future__ import annotations

import copy
import functools
import re
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..data.collator import PreferenceCollator
from ..data.rows import RESPONSES
from .attention_masks import takes_any_mask
from .causal_lm import CausalLM
from .noise import evaluation_mode
from .stand_ins import TOKENS, scaled_down, shaken

# What the code of a model raises that can't be built or run in a way.
_CANT = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)

_MOST_TOLERANCE = 1e-2  # of what rounding is allowed to change in a stand-in, by the spread of its states
_REACH = 6 * TOKENS  # the longest sequences of a probe have more than twice as many tokens

# The options of PreferenceCollator for each layout.
LAYOUTS = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared": {"shared_prompts": True},
    "shared_packed": {"padding_free": True, "shared_prompts": True},
}


@dataclass(frozen=True)
class Shown:
    """What a model's states are shown to be in.

    Attributes:
        layouts: those of `LAYOUTS` in which every sequence has the states that it has alone.
        repeats: states do not depend on the sequences that were run before.
    """

    layouts: frozenset[str]
    repeats: bool = True


def choose_layout(
    collator: Any,
    models: dict[str, CausalLM],
    *,
    shared_prompts: str,
    padding_free: bool,
    routed: bool,
    max_length: int | None,
) -> Any:
    """The collator, told to share prompts where the models allow it and `shared_prompts` asks for it.

    Where the other rows of a batch change a sequence's states, batches are read row by row.

    Args:
        collator: a PreferenceCollator; a collator of the user's own is left as it is.
        models: those that run on its batches, by the names of their arguments, the policy ("model") among them.
        shared_prompts, padding_free, max_length: the options.
        routed: a load-balancing loss is added: a prompt's routing then counts once for each response, as in TRL.

    Raises:
        ValueError: a model doesn't allow what an option asks for, or no layout gives the states of each sequence alone.
    """
    # A reference that is the policy's own model is tried with it.
    models = {
        name: model for name, model in models.items() if name == "model" or model.model is not models["model"].model
    }
    shown = {name: shown_of(model, max_length) for name, model in models.items()}

    def refusing(layout: str) -> str | None:
        """The first model that is not shown to have in this layout the states of each sequence alone."""
        for name, model in models.items():
            if layout not in shown[name].layouts or not agrees_with_padding(model, layout):
                return name
        return None

    for name, model in models.items():
        problem = _unfit(model, shown[name], max_length)
        if problem is not None:
            raise ValueError(f"{name}: {problem}")
    if padding_free and (mixing := refusing("packed")):
        raise ValueError(
            f"padding_free is True, but {mixing} mixes packed sequences, or is not shown to keep them apart "
            f"({_kind(models[mixing])}); choose another attn_implementation, or padding"
        )
    if not isinstance(collator, PreferenceCollator):
        return collator
    if shared_prompts == "always" or (shared_prompts == "auto" and not routed):
        mixing = refusing("shared_packed" if padding_free else "shared")
        if not mixing:
            return replace(collator, shared_prompts=True)
        if shared_prompts == "always":
            raise ValueError(
                f"shared_prompts is 'always', but {mixing} mixes responses to one prompt, or is not shown to keep them "
                f"apart ({_kind(models[mixing])})"
            )
    return collator if padding_free else replace(collator, row_by_row=refusing("padded") is not None)


def _kind(model: CausalLM) -> str:
    return f"{type(model.model).__name__} with attention {model.model.config._attn_implementation!r}"


def depends_on_the_batch(model: CausalLM, max_length: int | None) -> str | None:
    """Why a sequence's states are not its own in a padded batch, such as by rope that scales with the longest row.

    Args:
        model: any.
        max_length: tokens of the longest sequence; None has no limit.

    Returns:
        The reason; None if they are its own.

    Raises:
        ValueError: nor are they in a row alone.
    """
    shown = shown_of(model, max_length)
    problem = _unfit(model, shown, max_length)
    if problem is not None:
        raise ValueError(problem)
    return None if "padded" in shown.layouts else "its hidden states depend on the other rows of a batch"


def _unfit(model: CausalLM, shown: Shown, max_length: int | None) -> str | None:
    """Why no layout gives the states of each sequence alone."""
    if not shown.repeats:
        return (
            f"what {type(model.model).__name__} computes for a sequence depends on chance, or on the sequences that it "
            f"has read before, as by rope that grows with the longest one: set max_length, {max_length}, to what it "
            "was trained for"
        )
    return None


def shown_of(model: CausalLM, max_length: int | None) -> Shown:
    """What a stand-in shows, whose sequences reach beyond all windows; without one, the model on a few tokens."""

    probe = model.probe
    subject = _Subject(
        type(probe.model),
        repr(probe.model.config.to_dict()) + probe.model.config._attn_implementation,
        sys.maxsize if max_length is None else max_length,
        probe.fallback_reason,
        copy.deepcopy(probe.model.config),
    )
    shown = _shown_by_stand_in(subject)
    if shown is None:
        try:
            shown = _try(probe, 3)
        except _CANT:  # a model that can't be run in this way is told so by its first batch
            return Shown(frozenset({"padded"}))
        return replace(shown, layouts=shown.layouts & {"padded"})
    return shown


@dataclass(frozen=True)
class _Subject:
    """What a stand-in stands for: all that has an influence on what it shows."""

    kind: type
    options: str
    longest: int
    fallback_reason: str | None
    config: Any = field(compare=False)


@functools.lru_cache(maxsize=32)
def _shown_by_stand_in(subject: _Subject) -> Shown | None:
    """What stand-ins show; None where there is none."""

    def of_stand_in(*, all_windows: bool) -> Shown:
        small, other = (
            scaled_down(subject.kind, subject.config, longest=subject.longest, all_windows=all_windows)
            for _ in range(2)
        )
        model = CausalLM(small, None, 1.0, subject.fallback_reason)
        return _try(model, _REACH, replace(model, model=shaken(other)))

    try:
        shown = of_stand_in(all_windows=True)
        selected = _selected_keys(subject.config.get_text_config())
        if selected is not None:  # among near-equal keys by rounding, which any layout changes: no probe can tell
            return Shown(frozenset({"padded"} if selected >= subject.longest else ()), shown.repeats)
        if "padded" in shown.layouts and shown.repeats:
            return shown
        # In rows of one sequence, nothing that is longer than the longest of them matters.
        near = of_stand_in(all_windows=False)
        return Shown(shown.layouts - {"padded"} | near.layouts & {"padded"}, near.repeats)
    except _CANT:
        return None


def _selected_keys(config: Any) -> int | None:
    """How many keys sparse attention selects for a query; None where it attends to all."""
    numbers = {name: value for name, value in vars(config).items() if isinstance(value, int)}
    counts = [
        value * (numbers.get("index_block_size", 1) if "block" in name else 1)
        for name, value in numbers.items()
        if re.search(r"index.*(top_?k|budget)|keep_window", name)
    ]
    return min(counts, default=None)


@torch.no_grad()
def agrees_with_padding(model: CausalLM, layout: str) -> bool:
    """Whether a few sequences have the same states in a layout as in rows of their own: tried on the model itself."""
    probe = model.probe
    if layout == "padded":
        return True
    with evaluation_mode(probe.model):
        try:
            pairs = _pairs(probe, 2)[:2]
            difference = _difference(_states(probe, pairs, layout), padded := _states(probe, pairs, "padded"))
            low = torch.is_autocast_enabled(padded.device.type) or padded.dtype not in (torch.float32, torch.float64)
            return difference <= (0.02 if low else 1e-3)
        except _CANT:
            return False


@torch.no_grad()
def _try(model: CausalLM, reach: int, rounded: CausalLM | None = None) -> Shown:
    """What sequences of up to thrice `reach` tokens show. Raises what the model does where it can't run them alone.

    Args:
        model: is run.
        reach: tokens of the longest response.
        rounded: the model with other rounding, by which differences are judged.
    """
    pairs = _pairs(model, reach)
    sequences = [torch.tensor(row["prompt_ids"] + row[f"{side}_ids"]) for side in RESPONSES for row in pairs]
    prompts = [len(row["prompt_ids"]) for _ in RESPONSES for row in pairs]

    def alone(model: CausalLM, ids: Tensor) -> Tensor:
        return _read(model, {"input_ids": ids[None].to(model.weight.device)})[0]

    with evaluation_mode(model.model), torch.autocast(model.weight.device.type, enabled=False):
        states = [alone(model, ids) for ids in sequences]
        tolerance = 1e-4
        if rounded is not None:
            changes = [_difference(alone(rounded, ids), states[number]) for number, ids in enumerate(sequences)]
            tolerance = min(max(10 * max(changes), tolerance), _MOST_TOLERANCE)
        # Once more, the longest first: what grows with the longest sequence so far is not what it was.
        order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
        repeats = all(_difference(alone(model, sequences[number]), states[number]) <= tolerance for number in order)
        predicting = torch.cat([some[max(prompt, 1) - 1 : -1] for some, prompt in zip(states, prompts)])
        layouts = set()
        for layout in LAYOUTS:
            try:
                if _difference(_states(model, pairs, layout), predicting) <= tolerance:
                    layouts.add(layout)
            except _CANT:
                continue
    return Shown(frozenset(layouts), repeats)


def _read(model: CausalLM, batch: dict[str, Tensor]) -> Tensor:
    return model.hidden(**batch) if model.fallback_reason is None else model.logits(**batch)


def _states(model: CausalLM, pairs: list[dict[str, Any]], layout: str) -> Tensor:
    """What predicts the response tokens of pairs in a layout."""
    if "shared" in layout and not takes_any_mask(model.model.config):
        raise ValueError("this model's layers don't take masks of any form")
    pad_token_id = getattr(model.model.config.get_text_config(), "pad_token_id", None) or 0
    options: dict[str, Any] = LAYOUTS[layout]
    batch = PreferenceCollator(pad_token_id, **options)(pairs)
    tensors = {name: value.to(model.weight.device) for name, value in batch.items() if isinstance(value, Tensor)}
    return _read(model, tensors).flatten(0, 1)[tensors["rows"]]


def _pairs(model: CausalLM, reach: int) -> list[dict[str, Any]]:
    """Pairs of random tokens: a long prompt, a long response behind a short prompt, and no prompt."""
    lengths = [(2 * reach + 1, 3, 5), (2, 3, 4), (1, reach, 2), (0, 3, 4)]
    draw = torch.Generator().manual_seed(0)
    least = min(3, model.vocab_size - 1)  # behind the ids that mean something
    tokens = [
        [torch.randint(least, model.vocab_size, (length,), generator=draw).tolist() for length in of_pair]
        for of_pair in lengths
    ]
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), of_pair)) for of_pair in tokens]


def _difference(some: Tensor, others: Tensor) -> float:
    """The largest difference of states, by their spread; infinite where one is not finite."""
    largest = ((some.float() - others.float()).abs() / (others.float().std() + others.float().abs())).max()
    return float("inf") if largest.isnan() else largest.item()
