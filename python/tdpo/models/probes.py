"""What a model does with batches that are laid out otherwise than one padded sequence a row, tried on a few tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..data.collator import PreferenceCollator
from .attention_masks import takes_any_mask
from .causal_lm import CausalLM

_LONGEST_PROBED_WINDOW = 64  # tokens: a probe beyond the windows of large models would take longer than it tells


def choose_layout(
    collator: Any, models: dict[str, CausalLM], *, shared_prompts: str, padding_free: bool, routed: bool
) -> Any:
    """The collator, told to share prompts where the models allow it and `shared_prompts` asks for it.

    Args:
        collator: a PreferenceCollator; a collator of the user's own is left as it is.
        models: those that run on its batches, by the names of their arguments, the policy ("model") among them.
        shared_prompts, padding_free: the options.
        routed: a load-balancing loss is added: a prompt's routing then counts once for each response, as in TRL.

    Raises:
        ValueError: a model doesn't allow what an option asks for.
    """
    wanted = shared_prompts == "always" or (shared_prompts == "auto" and not routed)
    if wanted and isinstance(collator, PreferenceCollator):
        mixing = [name for name, model in models.items() if not keeps_branches_apart(model)]
        if not mixing:
            return replace(collator, shared_prompts=True)
        if shared_prompts == "always":
            raise ValueError(
                f"shared_prompts is 'always', but {mixing[0]} mixes responses to one prompt (with attention "
                f"{_attention(models[mixing[0]])!r})"
            )
    if padding_free and not isolates_packed_sequences(models["model"]):
        raise ValueError(
            "padding_free is True, but this model lets packed sequences attend to each other (with attention "
            f"{_attention(models['model'])!r}); choose another attn_implementation, or padding"
        )
    return collator


def _attention(model: CausalLM) -> str:
    return model.model.config._attn_implementation


@torch.no_grad()
def isolates_packed_sequences(model: CausalLM) -> bool:
    """Whether sequences packed into one row and separated by position_ids alone do not attend to each other."""
    probe = model.probe
    device = probe.weight.device
    tokens = (torch.arange(1, 9, device=device) % probe.vocab_size)[None]
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=device)
    packed = probe.hidden(input_ids=tokens, position_ids=positions)
    alone = probe.hidden(input_ids=tokens[:, 3:], position_ids=positions[:, 3:])
    return _equal_to_rounding(packed[:, 3:], alone)


@torch.no_grad()
def keeps_branches_apart(model: CausalLM) -> bool:
    """Whether responses that share a prompt, and pairs behind each other, have the hidden states of each alone.

    Attention must take a mask of any form, and every layer must attend within the window that the config tells.
    """
    probe, config = model.probe, model.model.config
    if not takes_any_mask(config):
        return False
    window = min(getattr(config.get_text_config(), "sliding_window", None) or 0, _LONGEST_PROBED_WINDOW)
    draw = torch.arange(window + 11) % (probe.vocab_size - 1) + 1
    first = {"prompt_ids": draw[: window + 3].tolist(), "chosen_ids": draw[-8:-4].tolist()}
    second = {**first, "prompt_ids": [2, 1], "rejected_ids": [1, 2, 3]}
    pairs = [{**first, "rejected_ids": draw[-4:].tolist()}, second]
    states = []
    was_training = probe.model.training
    probe.model.eval()
    try:
        for shared in (True, False):
            batch = PreferenceCollator(0, padding_free=shared, shared_prompts=shared)(pairs)
            tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
            batch = {name: value.to(probe.weight.device) for name, value in tensors.items()}
            states.append(probe.hidden(**batch).flatten(0, 1)[batch["rows"]])
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return False
    finally:
        probe.model.train(was_training)
    together, apart = states
    return _equal_to_rounding(together, apart)


def _equal_to_rounding(some: Tensor, others: Tensor) -> bool:
    """Whether hidden states differ by no more than the order of summation explains."""
    rounded = torch.is_autocast_enabled(others.device.type) or others.dtype not in (torch.float32, torch.float64)
    tolerance = 0.02 if rounded else 1e-3
    return torch.allclose(some, others, rtol=tolerance, atol=tolerance * others.std().item())
