"""From tokenized preferences to batches, and which hidden states of a batch predict response tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .rows import RESPONSES


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


class Sequence(NamedTuple):
    """A prompt and one response.

    Attributes:
        ids: its tokens.
        prompt: how many of them are the prompt's.
        learned: the places of the response tokens that the loss sees and that have a predictor, ascending.
    """

    ids: list[int]
    prompt: int
    learned: list[int]

    @classmethod
    def of(cls, row: dict[str, Any], side: str) -> Sequence:
        """A response of a tokenized row, with its prompt; without a mask the loss sees all of the response."""
        prompt, response, mask = len(row["prompt_ids"]), row[f"{side}_ids"], row.get(f"{side}_mask")
        places = range(max(prompt, 1), prompt + len(response))
        learned = list(places) if mask is None else [place for place in places if mask[place - prompt]]
        return cls(row["prompt_ids"] + response, prompt, learned)


def sequences_of(rows: list[dict[str, Any]]) -> list[Sequence]:
    """The sequences of tokenized rows, in the order of a batch's."""
    return [Sequence.of(row, side) for side in RESPONSES for row in rows]


class _Line(NamedTuple):
    """Tokens that stand in one row of the input, in order, with their positions and segments (see `branch_mask`)."""

    ids: Tensor  # (T,)
    positions: Tensor
    segments: Tensor


@dataclass
class PreferenceCollator:
    """Batches of tokenized preferences: the B chosen sequences first, then the B rejected ones.

    A batch holds `dataset_row`, (B,), the rows of the dataset; `token_row`, (B,), those of the tokenized dataset; the
    model's input; and for the R response tokens that the loss sees and that have a predictor, in order:

        rows         (R,), the flat positions of the hidden states that predict them
        targets      (R,), the tokens
        cu_seqlens   (2B + 1,), the offsets of the sequences among them; `row_lengths`, their 2B lengths, are integers
        num_tokens   how many tokens the 2B sequences have, prompts included

    Attributes:
        pad_token_id: pads `input_ids`, (2B, T), which have an `attention_mask`.
        padding_free: `input_ids` are packed instead, (1, N), with `position_ids`.
        stored_hidden: reads the reference's hidden states of a row's response, such as a cache's `hidden`, for
            `ref_hidden`, (R, D_ref), at these positions.
        shared_prompts: a pair's prompt stands in the input once: `input_ids`, (B, T) or (1, N), have
            [prompt | chosen | rejected], with `position_ids` and `segments` (see `branch_mask`) and no mask.
        row_by_row: the model reads the rows of `input_ids` one after another, each without its padding; the batch has
            `row_lengths_alone`, integers. For models in which a batch's rows change each other.
        token_columns: names of numbers per response token, `chosen_NAME` and `rejected_NAME` of the rows; the batch
            holds them, (R,) each, in a dict of that name.
    """

    pad_token_id: int
    padding_free: bool = False
    stored_hidden: Callable[[int, str], Tensor] | None = None
    shared_prompts: bool = False
    row_by_row: bool = False
    token_columns: tuple[str, ...] = ()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        with torch.device("cpu"):  # whatever the default device is: a loader's workers and pinned memory need it
            return self._batch(examples)

    def _batch(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        sequences = sequences_of(examples)
        lines = _shared_lines(sequences) if self.shared_prompts else _lines(sequences)
        # `dataset_row` comes first: transformers takes the length of a batch's first tensor for the batch size.
        batch: dict[str, Any] = {
            name: torch.tensor([row.get(name, -1) for row in examples]) for name in ("dataset_row", "token_row")
        }
        batch |= self._inputs(lines)
        places = self._places(sequences, [len(line.ids) for line in lines])
        lengths = [len(sequence.learned) for sequence in sequences]
        batch["rows"] = torch.cat([place[_before(sequence.learned)] for sequence, place in zip(sequences, places)])
        targets = [sequence.ids[place] for sequence in sequences for place in sequence.learned]
        batch["targets"] = torch.tensor(targets, dtype=torch.long)
        batch["cu_seqlens"] = torch.tensor([0, *accumulate(lengths)])
        batch["row_lengths"] = lengths  # known here without waiting for a device, and so never asked of it
        batch["num_tokens"] = sum(len(sequence.ids) for sequence in sequences)
        if self.row_by_row:
            batch["row_lengths_alone"] = [len(line.ids) for line in lines]
        if self.token_columns:
            batch["token_columns"] = {name: _token_column(name, examples, sequences) for name in self.token_columns}
        if self.stored_hidden is not None:
            states = [self.stored_hidden(row["token_row"], side) for side in RESPONSES for row in examples]
            batch["ref_hidden"] = torch.cat(states)
        return batch

    def _inputs(self, lines: list[_Line]) -> dict[str, Tensor]:
        """The model's input: the lines as padded rows, or concatenated into one."""
        ids, positions, segments = zip(*lines)
        if self.padding_free:
            inputs = {"input_ids": torch.cat(ids)[None], "position_ids": torch.cat(positions)[None]}
            return inputs | ({"segments": torch.cat(segments)[None]} if self.shared_prompts else {})
        input_ids = pad_sequence(list(ids), batch_first=True, padding_value=self.pad_token_id)
        if not self.shared_prompts:
            mask = pad_sequence([torch.ones_like(line) for line in ids], batch_first=True)
            return {"input_ids": input_ids, "attention_mask": mask}
        return {
            "input_ids": input_ids,
            "position_ids": pad_sequence(list(positions), batch_first=True),
            "segments": pad_sequence(list(segments), batch_first=True, padding_value=-1),
        }

    def _places(self, sequences: list[Sequence], lengths: list[int]) -> list[Tensor]:
        """Where the tokens of each sequence stand in the flattened input, (T,); `lengths` are those of the lines."""
        starts = [0, *accumulate(lengths)] if self.padding_free else range(0, max(lengths) * len(lengths), max(lengths))
        places = [torch.arange(len(sequence.ids)) for sequence in sequences]
        for number, sequence in enumerate(sequences):
            places[number] += starts[number % len(lengths)]
            if self.shared_prompts and number >= len(lengths):  # the rejected response follows the chosen one
                chosen = sequences[number - len(lengths)]
                places[number][sequence.prompt :] += len(chosen.ids) - chosen.prompt
        return places


def _before(places: list[int]) -> Tensor:
    """The places whose hidden states predict the tokens at `places`."""
    return torch.tensor(places, dtype=torch.long) - 1


def _token_column(name: str, examples: list[dict[str, Any]], sequences: list[Sequence]) -> Tensor:
    """A column at the response tokens of all sequences that the loss sees and that have a predictor, (R,)."""
    columns = [row[f"{side}_{name}"] for side in RESPONSES for row in examples]
    values = [
        column[place - sequence.prompt] for column, sequence in zip(columns, sequences) for place in sequence.learned
    ]
    return torch.tensor(values, dtype=torch.float32)


def _lines(sequences: list[Sequence]) -> list[_Line]:
    """One line for each sequence."""
    lines = [torch.tensor(sequence.ids) for sequence in sequences]
    return [_Line(ids, torch.arange(len(ids)), torch.zeros_like(ids)) for ids in lines]


def _shared_lines(sequences: list[Sequence]) -> list[_Line]:
    """One line for each pair: prompt, chosen, rejected; the positions of both responses continue the prompt's."""
    pairs, lines = len(sequences) // 2, []
    for pair, (chosen, rejected) in enumerate(zip(sequences[:pairs], sequences[pairs:])):
        prompt = chosen.prompt
        positions = [torch.arange(len(chosen.ids)), torch.arange(prompt, len(rejected.ids))]
        lengths = torch.tensor([prompt, len(chosen.ids) - prompt, len(rejected.ids) - prompt])
        segments = 3 * pair + torch.repeat_interleave(lengths)
        lines.append(_Line(torch.tensor(chosen.ids + rejected.ids[prompt:]), torch.cat(positions), segments))
    return lines
