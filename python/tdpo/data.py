"""Preference data: from (prompt, chosen, rejected) texts to padded batches of chosen, then rejected sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

COLUMNS = ("prompt", "chosen", "rejected")
IGNORE_INDEX = -100


def tokenize_preferences(dataset: Dataset, tokenizer, max_length: int, max_prompt_length: int) -> Dataset:
    """Adds `prompt_ids`, `chosen_ids` and `rejected_ids` to rows of prompt, chosen and rejected texts.

    A response ends with the tokenizer's end token. A prompt longer than `max_prompt_length` tokens keeps its end; a
    response that doesn't fit `max_length` keeps its beginning and the end token.

    Raises:
        ValueError: a column is missing or empty, or the tokenizer has no end token.
    """
    missing = [column for column in COLUMNS if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; responses need an end")

    def encode(row: dict) -> dict:
        for column in COLUMNS[1:]:
            if not row[column]:
                raise ValueError(f"a row has an empty {column!r} response: prompt {row['prompt'][:80]!r}")
        prompt = tokenizer(row["prompt"], add_special_tokens=True)["input_ids"]
        if prompt and prompt[-1] == tokenizer.eos_token_id:  # some tokenizers close every text
            prompt = prompt[:-1]
        prompt = prompt[-max_prompt_length:]
        ids = {"prompt_ids": prompt}
        for column in COLUMNS[1:]:
            response = tokenizer(row[column], add_special_tokens=False)["input_ids"]
            ids[f"{column}_ids"] = [*response[: max_length - len(prompt) - 1], tokenizer.eos_token_id]
        return ids

    return dataset.map(encode, desc="Tokenizing preferences")


@dataclass
class PreferenceCollator:
    """Pads a list of tokenized preferences to (2B, T): the chosen sequences first, then the rejected ones.

    Returns input_ids, attention_mask and labels; labels are `IGNORE_INDEX` on prompt and padding (Hugging Face style:
    not shifted).
    """

    pad_token_id: int

    def __call__(self, rows: list[dict]) -> dict[str, Tensor]:
        sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected") for row in rows]
        longest = max(len(prompt) + len(response) for prompt, response in sequences)
        shape = (len(sequences), longest)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "attention_mask": torch.zeros(shape, dtype=torch.int64),
            "labels": torch.full(shape, IGNORE_INDEX),
        }
        for index, (prompt, response) in enumerate(sequences):
            end = len(prompt) + len(response)
            batch["input_ids"][index, :end] = torch.tensor(prompt + response)
            batch["attention_mask"][index, :end] = 1
            batch["labels"][index, len(prompt) : end] = torch.tensor(response)
        return batch
