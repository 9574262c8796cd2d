"""Preference data: from rows in any of the usual forms to tokens, and from tokens to batches.

Forms: prompt/chosen/rejected texts; chosen/rejected texts with the prompt in both (implicit), transcripts in the manner
of Anthropic's HH ("\\n\\nHuman: ...\\n\\nAssistant: ...") among them; the same as lists of chat messages, to which the
tokenizer's chat template is applied, `tools` passed through.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from torch import Tensor

logger = logging.getLogger(__name__)
IGNORE_INDEX = -100
RESPONSES = ("chosen", "rejected")
_FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def load_preferences(name: str, split: str = "train") -> Dataset:
    """Rows from a JSON, JSONL, Parquet or CSV file, from a folder that `save_to_disk` wrote, or from a hub.

    Raises:
        ValueError: there is no such file, and no such data set on the hub.
    """
    path = Path(name)
    if path.suffix in _FILES:
        if not path.is_file():
            raise ValueError(f"the dataset file {name} does not exist")
        return load_dataset(_FILES[path.suffix], data_files=str(path), split="train")
    if path.is_dir():
        found = load_from_disk(name)
        return found[split] if isinstance(found, DatasetDict) else found
    try:
        return load_dataset(name, split=split)
    except Exception as error:
        raise ValueError(
            f"the dataset {name!r} (split {split!r}) is no file and could not be loaded: {error}"
        ) from error


def _shared_prefix(first: Any, second: Any) -> int:
    length = 0
    for a, b in zip(first, second):
        if a != b:
            break
        length += 1
    return length


def _with_prompt(row: dict) -> dict:
    """The row with an explicit prompt."""
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        return row
    if isinstance(chosen, str):
        shared = _shared_prefix(chosen, rejected)
        if chosen.startswith(
            _HUMAN
        ):  # a transcript: the prompt ends where the last shared turn of the assistant begins
            shared = chosen.rfind(_ASSISTANT, 0, shared) + len(_ASSISTANT)
        else:
            shared = chosen.rfind(" ", 0, shared) if shared < min(len(chosen), len(rejected)) else shared
        shared = max(shared, 0)
    else:
        shared = min(_shared_prefix(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    return {**row, "prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _texts(row: dict, tokenizer) -> dict[str, str]:
    """Prompt and responses as texts; chat messages go through the tokenizer's template."""
    row = _with_prompt(row)
    if isinstance(row["chosen"], str):
        return {name: row[name] for name in ("prompt", *RESPONSES)}
    prompt = row["prompt"] if not isinstance(row["prompt"], str) else [{"role": "user", "content": row["prompt"]}]
    options = {"tools": row.get("tools"), "tokenize": False}
    goes_on = bool(prompt) and prompt[-1]["role"] == "assistant"
    start = {"continue_final_message": True} if goes_on else {"add_generation_prompt": True}
    texts = {"prompt": tokenizer.apply_chat_template(prompt, **start, **options)}
    for name in RESPONSES:
        whole = tokenizer.apply_chat_template([*prompt, *row[name]], **options)
        shared = _shared_prefix(whole, texts["prompt"])
        if shared < len(texts["prompt"]) and not whole.startswith(texts["prompt"].rstrip()):
            raise ValueError(
                "the tokenizer's chat template does not begin a conversation as it begins its prompt, so the response "
                f"can't be told apart; prompt: {texts['prompt'][-80:]!r}"
            )
        texts[name] = whole[shared:]
    return texts


class _Encoder:
    """A row to token ids and, in `dropped`, the reason why it can't be used ("" if it can)."""

    def __init__(self, tokenizer, max_length: int, max_prompt_length: int, overlong: str):
        self.tokenizer, self.overlong = tokenizer, overlong
        self.max_length, self.max_prompt_length = max_length, max_prompt_length

    def __call__(self, row: dict, index: int) -> dict:
        ids: dict[str, Any] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
        return {**ids, "index": index, "dropped": self._fill(row, ids) or "", **ids}

    def _fill(self, row: dict, ids: dict) -> str | None:
        for name in RESPONSES:
            if not row[name]:
                return f"an empty {name!r} response"
        texts = _texts(row, self.tokenizer)
        templated = not isinstance(row["chosen"], str)  # the template has its own special tokens
        end = self.tokenizer.eos_token_id
        prompt = self.tokenizer(texts["prompt"], add_special_tokens=not templated)["input_ids"]
        if prompt and prompt[-1] == end and not templated:  # some tokenizers close every text
            prompt = prompt[:-1]
        if len(prompt) > self.max_prompt_length and self.overlong == "drop":
            return f"a prompt over {self.max_prompt_length} tokens"
        ids["prompt_ids"] = prompt = prompt[-self.max_prompt_length :]
        room = self.max_length - len(prompt)
        for name in RESPONSES:
            response = self.tokenizer(texts[name], add_special_tokens=False)["input_ids"]
            response = response if end in response[-3:] else [*response, end]
            if len(response) > room and self.overlong == "drop":
                return f"prompt and {name!r} response over {self.max_length} tokens"
            ids[f"{name}_ids"] = response if len(response) <= room else [*response[: room - 1], end]
        return "equal responses" if ids["chosen_ids"] == ids["rejected_ids"] else None


def tokenize_preferences(
    dataset: Dataset, tokenizer, max_length: int, max_prompt_length: int, overlong: str = "truncate"
) -> Dataset:
    """Rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, with the `index` they had and their `position` here.

    A response ends with the tokenizer's end token. A prompt longer than `max_prompt_length` tokens keeps its end; a
    response that doesn't fit `max_length` keeps its beginning and the end token; or, with `overlong="drop"`, such rows
    are dropped. Rows with an empty response or with equal responses are always dropped. What was dropped, and why, is
    logged as a warning.

    Raises:
        ValueError: a column is missing, no row is left, or the tokenizer has no end token or no chat template.
    """
    missing = [column for column in RESPONSES if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token; responses need an end")
    if not isinstance(dataset[0]["chosen"], str) and tokenizer.chat_template is None:
        raise ValueError("the dataset holds chat messages but the tokenizer has no chat template")
    encode = _Encoder(tokenizer, max_length, max_prompt_length, overlong)
    columns = dataset.column_names
    encoded = dataset.map(encode, with_indices=True, remove_columns=columns, desc="Tokenizing preferences")
    dropped = Counter(reason for reason in encoded["dropped"] if reason)
    if dropped:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.most_common())
        if dropped.total() == len(dataset):
            raise ValueError(f"no row of the dataset is left: of {len(dataset)} rows, {reasons}")
        logger.warning("dropped %d of %d rows: %s", dropped.total(), len(dataset), reasons)
        encoded = encoded.filter(lambda reason: not reason, input_columns="dropped", desc="Dropping rows")
    return encoded.remove_columns("dropped").add_column("position", list(range(len(encoded))))


def padding_token(tokenizer) -> int:
    """The id that pads batches: the tokenizer's, or its end token where it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


@dataclass
class PreferenceCollator:
    """Batches of tokenized preferences: the chosen sequences first, then the rejected ones.

    A batch holds input_ids, padded to (2B, T) with an attention_mask or, with `padding_free`, packed to (1, N) with
    position_ids; `index`, (B,), the rows of the dataset; and of the response tokens, in order: `rows`, (R,), the flat
    positions of the hidden states that predict them; `targets`, (R,), the tokens; `cu_seqlens`, (2B + 1,), the offsets
    of the sequences among them. With a `reference_cache`, `ref_hidden`, (R, D_ref), is what the reference's head reads
    at those positions.
    """

    pad_token_id: int
    padding_free: bool = False
    reference_cache: Any = None

    def __call__(self, examples: list[dict]) -> dict[str, Tensor]:
        sequences = [(row["prompt_ids"], row[f"{side}_ids"]) for side in RESPONSES for row in examples]
        lengths = [len(prompt) + len(response) for prompt, response in sequences]
        stride = 0 if self.padding_free else max(lengths)
        starts = [sum(lengths[:i]) if self.padding_free else i * stride for i in range(len(sequences))]
        batch: dict[str, Any] = {"index": torch.tensor([row.get("index", -1) for row in examples])}
        if self.padding_free:
            batch["input_ids"] = torch.tensor(
                [[token for prompt, response in sequences for token in prompt + response]]
            )
            batch["position_ids"] = torch.tensor([[position for length in lengths for position in range(length)]])
        else:
            batch["input_ids"] = torch.full((len(sequences), stride), self.pad_token_id)
            batch["attention_mask"] = torch.zeros(len(sequences), stride, dtype=torch.int64)
            for index, (prompt, response) in enumerate(sequences):
                batch["input_ids"][index, : lengths[index]] = torch.tensor(prompt + response)
                batch["attention_mask"][index, : lengths[index]] = 1
        rows, targets, offsets = list[int](), list[int](), [0]
        for start, (prompt, response) in zip(starts, sequences):
            first = start + predicting_from(prompt)
            rows += range(first, start + len(prompt) + len(response) - 1)
            targets += response[first - start - len(prompt) + 1 :]
            offsets.append(len(rows))
        batch["rows"], batch["targets"] = torch.tensor(rows), torch.tensor(targets)
        batch["cu_seqlens"] = torch.tensor(offsets)
        if self.reference_cache is not None:
            hidden = [self.reference_cache.hidden(row["position"], side) for side in RESPONSES for row in examples]
            batch["ref_hidden"] = torch.cat(hidden)
        return batch


def predicting_from(prompt: list[int]) -> int:
    """The position of the first hidden state that predicts a response token: nothing predicts the very first token."""
    return max(0, len(prompt) - 1)
