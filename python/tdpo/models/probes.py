"""Which layouts of a batch leave every sequence the hidden states that it has alone, tried on a few tokens."""

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

# What a model's code raises where it can't be built, or can't be run in a layout.
_CANT = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError)

_MOST_TOLERANCE = 1e-2  # the largest difference that can pass for rounding in a stand-in, by the spread of its states
_REACH = 6 * TOKENS  # the longest sequences of a probe have more than twice as many tokens

# The options of PreferenceCollator for each layout.
LAYOUTS = {
    "padded": {},
    "packed": {"padding_free": True},
    "shared": {"shared_prompts": True},
    "shared_packed": {"padding_free": True, "shared_prompts": True},
}


@dataclass(frozen=True)
class ProbeResult:
    """What a probe has found.

    Attributes:
        layouts: those of `LAYOUTS` in which every sequence has the hidden states that it has alone.
        repeats: a sequence has the same states again after others were run.
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
        models: those that read its batches, by the names of their arguments: "model" is the policy.
        shared_prompts, padding_free, max_length: the options.
        routed: a load-balancing loss is added: a prompt's routing then counts once for each response, as in TRL.

    Raises:
        ValueError: a model doesn't allow what an option asks for, or no layout gives the states of each sequence alone.
    """
    # A reference that is the policy's own model needs no probe of its own.
    models = {
        name: model for name, model in models.items() if name == "model" or model.model is not models["model"].model
    }
    results = {name: probe_model(model, max_length) for name, model in models.items()}
    for name, model in models.items():
        if not results[name].repeats:
            raise ValueError(f"{name}: {_not_repeatable(model, max_length)}")

    def first_unfit(layout: str) -> str | None:
        """The first model whose sequences are not shown to keep their states in a layout."""
        for name, model in models.items():
            if layout not in results[name].layouts or not agrees_with_padding(model, layout):
                return name
        return None

    if padding_free and (mixing := first_unfit("packed")):
        raise ValueError(
            f"padding_free is True, but {mixing} mixes packed sequences, or is not shown to keep them apart "
            f"({_kind(models[mixing])}); choose another attn_implementation, or padding"
        )
    if not isinstance(collator, PreferenceCollator):
        return collator
    if shared_prompts == "always" or (shared_prompts == "auto" and not routed):
        mixing = first_unfit("shared_packed" if padding_free else "shared")
        if not mixing:
            return replace(collator, shared_prompts=True)
        if shared_prompts == "always":
            raise ValueError(
                f"shared_prompts is 'always', but {mixing} mixes responses to one prompt, or is not shown to keep them "
                f"apart ({_kind(models[mixing])})"
            )
    return collator if padding_free else replace(collator, row_by_row=first_unfit("padded") is not None)


def _kind(model: CausalLM) -> str:
    return f"{type(model.model).__name__} with attention {model.model.config._attn_implementation!r}"


def depends_on_the_batch(model: CausalLM, max_length: int | None) -> str | None:
    """Why a sequence's states depend on the other rows of a padded batch, as with rope that scales with the longest.

    Args:
        model: any.
        max_length: tokens of the longest sequence; None has no limit.

    Returns:
        The reason; None if they don't.

    Raises:
        ValueError: they depend on earlier batches, or on chance.
    """
    result = probe_model(model, max_length)
    if not result.repeats:
        raise ValueError(_not_repeatable(model, max_length))
    return None if "padded" in result.layouts else "its hidden states depend on the other rows of a batch"


def _not_repeatable(model: CausalLM, max_length: int | None) -> str:
    return (
        f"what {type(model.model).__name__} computes for a sequence depends on chance, or on the sequences that it "
        f"has read before, as by rope that grows with the longest one: set max_length, {max_length}, to what it "
        "was trained for"
    )


def probe_model(model: CausalLM, max_length: int | None) -> ProbeResult:
    """Probes a stand-in, with sequences that reach beyond all windows; without one, the model on a few tokens."""
    config = model.model.config
    subject = _Subject(
        type(model.probe.model),
        repr(config.to_dict()) + config._attn_implementation,
        sys.maxsize if max_length is None else max_length,
        model.fallback_reason,
        copy.deepcopy(config),
    )
    result = _probe_stand_in(subject)
    if result is not None:
        return result
    try:
        result = _probe(model.probe, 3)
    except _CANT:  # the first batch will raise what is wrong
        return ProbeResult(frozenset({"padded"}))
    return replace(result, layouts=result.layouts & {"padded"})


@dataclass(frozen=True)
class _Subject:
    """What the result of a stand-in depends on."""

    kind: type
    options: str
    longest: int
    fallback_reason: str | None
    config: Any = field(compare=False)


@functools.lru_cache(maxsize=32)
def _probe_stand_in(subject: _Subject) -> ProbeResult | None:
    """Probes stand-ins; None where there is none."""

    def probe_small(*, all_windows: bool) -> ProbeResult:
        small, other = (
            scaled_down(subject.kind, subject.config, longest=subject.longest, all_windows=all_windows)
            for _ in range(2)
        )
        model = CausalLM(small, fallback_reason=subject.fallback_reason)
        return _probe(model, _REACH, replace(model, model=shaken(other)))

    try:
        result = probe_small(all_windows=True)
        selected = _selected_keys(subject.config.get_text_config())
        if selected is not None:  # rounding, which any layout changes, selects among near-equal keys: no probe can tell
            return ProbeResult(frozenset({"padded"} if selected >= subject.longest else ()), result.repeats)
        if "padded" in result.layouts and result.repeats:
            return result
        # In rows of one sequence, windows longer than the longest sequence do not matter.
        padded = probe_small(all_windows=False)
        return ProbeResult(result.layouts - {"padded"} | padded.layouts & {"padded"}, padded.repeats)
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
            difference = _difference(_states(probe, pairs, layout), _states(probe, pairs, "padded"))
            return difference <= (0.02 if probe.low_precision else 1e-3)
        except _CANT:
            return False


@torch.no_grad()
def _probe(model: CausalLM, reach: int, rounded: CausalLM | None = None) -> ProbeResult:
    """Runs sequences of up to three times `reach` tokens, each alone and in all layouts.

    Args:
        model: as it can be run.
        reach: tokens of the longest response.
        rounded: the model after a change of the size of rounding errors, whose effect differences are held to.

    Raises:
        Exception: any of `_CANT`, where the model can't run a sequence alone.
    """
    pairs = _pairs(model, reach)
    device = model.weight.device
    sequences = [
        torch.tensor(row["prompt_ids"] + row[f"{side}_ids"], device=device) for side in RESPONSES for row in pairs
    ]
    prompts = [len(row["prompt_ids"]) for _ in RESPONSES for row in pairs]

    def alone(model: CausalLM, ids: Tensor) -> Tensor:
        return _read(model, {"input_ids": ids[None]})[0]

    with evaluation_mode(model.model), torch.autocast(device.type, enabled=False):
        states = [alone(model, ids) for ids in sequences]
        tolerance = 1e-4
        if rounded is not None:
            changes = [_difference(alone(rounded, ids), states[number]) for number, ids in enumerate(sequences)]
            tolerance = min(max(10 * max(changes), tolerance), _MOST_TOLERANCE)
        # Once more, the longest first, so that what grows with the longest sequence so far shows.
        order = sorted(range(len(sequences)), key=lambda number: -len(sequences[number]))
        repeats = all(_difference(alone(model, sequences[number]), states[number]) <= tolerance for number in order)
        expected = torch.cat([some[max(prompt, 1) - 1 : -1] for some, prompt in zip(states, prompts)])
        layouts = set()
        for layout in LAYOUTS:
            try:
                if _difference(_states(model, pairs, layout), expected) <= tolerance:
                    layouts.add(layout)
            except _CANT:
                continue
    return ProbeResult(frozenset(layouts), repeats)


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
    draw = torch.Generator("cpu").manual_seed(0)
    least = min(3, model.vocab_size - 1)  # the first ids are usually special tokens
    tokens = [
        [torch.randint(least, model.vocab_size, (length,), generator=draw, device="cpu").tolist() for length in of_pair]
        for of_pair in lengths
    ]
    return [dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), of_pair)) for of_pair in tokens]


def _difference(some: Tensor, others: Tensor) -> float:
    """The largest difference of states, divided by their spread and size; infinite where one is NaN."""
    largest = ((some.float() - others.float()).abs() / (others.float().std() + others.float().abs())).max()
    return float("inf") if largest.isnan() else largest.item()
