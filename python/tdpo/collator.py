"""From tokenized preferences to batches, and which hidden states of a batch predict response tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .data import RESPONSES

if TYPE_CHECKING:
    from .reference_cache import ReferenceCache


def predicted_responses(
    input_ids: Tensor,  # (B, T) padded, or (1, N) packed
    is_response: Tensor,  # bool, as input_ids
    starts: Tensor,  # (sequences,)
) -> dict[str, Tensor]:
    """The response tokens that a hidden state predicts: all but a sequence's very first token.

    Args:
        input_ids: the sequences, in rows of their own or packed into one.
        is_response: true at response tokens.
        starts: the flat position of every sequence's first token, ascending.

    Returns:
        `rows`, (R,), the flat positions of the hidden states that predict these tokens; `targets`, (R,), the tokens;
        `cu_seqlens`, (sequences + 1,), the offsets of the sequences among them.
    """
    predicted = is_response.flatten().clone()
    predicted[starts] = False
    positions = predicted.nonzero()[:, 0]
    bounds = torch.cat([starts, starts.new_full((1,), predicted.numel())])
    return {
        "rows": positions - 1,
        "targets": input_ids.flatten()[positions],
        "cu_seqlens": torch.searchsorted(positions, bounds),
    }


class _Sequence(NamedTuple):
    ids: Tensor  # (T,)
    is_response: Tensor  # (T,), bool

    @classmethod
    def of(cls, prompt: list[int], response: list[int]) -> _Sequence:
        ids = torch.tensor(prompt + response)
        return cls(ids, torch.arange(len(ids)) >= len(prompt))


@dataclass
class PreferenceCollator:
    """Batches of tokenized preferences: the chosen sequences first, then the rejected ones.

    A batch holds `input_ids`, padded to (2B, T) with an `attention_mask` or, with `padding_free`, packed to (1, N) with
    `position_ids`; `index`, (B,), the rows of the dataset; and of the response tokens, in order: `rows`, (R,), the flat
    positions of the hidden states that predict them; `targets`, (R,), the tokens; `cu_seqlens`, (2B + 1,), the offsets
    of the sequences among them, and `row_lengths`, their 2B lengths as integers; `num_tokens`, how many tokens the 2B
    sequences have. With a `reference_cache` it also holds
    `ref_hidden`, (R, D_ref), the reference's hidden states at these positions.
    """

    pad_token_id: int
    padding_free: bool = False
    reference_cache: ReferenceCache | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = [_Sequence.of(row["prompt_ids"], row[f"{side}_ids"]) for side in RESPONSES for row in examples]
        # `index` comes first: transformers takes the length of a batch's first tensor for the batch size.
        batch: dict[str, Any] = {"index": torch.tensor([row.get("index", -1) for row in examples])}
        batch |= _packed(sequences) if self.padding_free else _padded(sequences, self.pad_token_id)
        # Known here without waiting for a device, and so never asked of it.
        batch["row_lengths"] = batch["cu_seqlens"].diff().tolist()
        batch["num_tokens"] = sum(len(sequence.ids) for sequence in sequences)
        if self.reference_cache is not None:
            states = [self.reference_cache.hidden(row["position"], side) for side in RESPONSES for row in examples]
            batch["ref_hidden"] = torch.cat(states)
        return batch


def _padded(sequences: list[_Sequence], pad_token_id: int) -> dict[str, Tensor]:
    input_ids = pad_sequence([sequence.ids for sequence in sequences], batch_first=True, padding_value=pad_token_id)
    is_response = pad_sequence([sequence.is_response for sequence in sequences], batch_first=True)
    attention_mask = pad_sequence([torch.ones_like(sequence.ids) for sequence in sequences], batch_first=True)
    starts = torch.arange(len(sequences)) * input_ids.shape[1]
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        **predicted_responses(input_ids, is_response, starts),
    }


def _packed(sequences: list[_Sequence]) -> dict[str, Tensor]:
    input_ids = torch.cat([sequence.ids for sequence in sequences])[None]
    is_response = torch.cat([sequence.is_response for sequence in sequences])[None]
    position_ids = torch.cat([torch.arange(len(sequence.ids)) for sequence in sequences])[None]
    starts = (position_ids[0] == 0).nonzero()[:, 0]
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        **predicted_responses(input_ids, is_response, starts),
    }
