"""From preference rows, in any of their forms (see `rows`), to token ids."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset, Features, List, Value
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..files import stream_digest
from .rows import (
    RESPONSES,
    Conversation,
    check_ids,
    check_row,
    check_token_column,
    conversations,
    is_empty,
    shared_prefix_length,
    with_own_prompt,
)

logger = logging.getLogger(__name__)
_ROWS_PER_DIGEST = 1000
TOKEN_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")


def tokens_digest(dataset: Dataset) -> str:
    """A digest of a tokenized dataset's token ids and nothing else."""
    columns = dataset.select_columns(list(TOKEN_IDS)).with_format("arrow")
    batches = columns.iter(batch_size=_ROWS_PER_DIGEST)
    tokens = (batch[name].combine_chunks() for batch in batches for name in columns.column_names)
    numbers = (part for some in tokens for part in (some.value_lengths(), some.flatten()))
    return stream_digest(
        np.ascontiguousarray(part.to_numpy(zero_copy_only=False), dtype=np.int64).data for part in numbers
    )


class _TokenIds(NamedTuple):
    """A row as the models see it; `columns` are numbers per response token by name, such as `chosen_weight`."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    columns: dict[str, list[float]] = {}  # noqa: RUF012


_NO_TOKENS = _TokenIds([], [], [])
_COLUMNS = Features(
    {
        "prompt_ids": List(Value("int64")),
        "chosen_ids": List(Value("int64")),
        "rejected_ids": List(Value("int64")),
        "dataset_row": Value("int64"),
        "length": Value("int64"),
        "dropped": Value("string"),  # why the row can't be used, "" if it can
    }
)


@dataclass
class _Encoder:
    """Turns a row into token ids, within the limits of `tokenize_preferences`."""

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    max_prompt_length: int
    overlong: str
    token_columns: tuple[str, ...] = ()  # full names: side_NAME
    _suffix = ""  # a row's columns are named side + suffix

    def __call__(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        try:
            ids, dropped = self.encode(row)
        except (ValueError, TemplateError) as error:  # a template may refuse the order of roles, for example
            raise ValueError(f"row {index} of the dataset: {error}") from error
        return {
            "prompt_ids": ids.prompt,
            "chosen_ids": ids.chosen,
            "rejected_ids": ids.rejected,
            "dataset_row": index,
            "length": len(ids.prompt) + max(len(ids.chosen), len(ids.rejected)),
            "dropped": dropped,
            **{name: ids.columns.get(name, []) for name in self.token_columns},
        }

    def encode(self, row: dict[str, Any]) -> tuple[_TokenIds, str]:
        """The token ids of a row and the reason why it can't be used, "" if it can."""
        self._check(row)
        for side in RESPONSES:
            if is_empty(row[f"{side}{self._suffix}"]):
                return _NO_TOKENS, f"an empty {side!r} response"
        row = self._split(row)
        for side in RESPONSES:
            if isinstance(row.get(side), list) and is_empty(row[side]):
                return _NO_TOKENS, f"an empty {side!r} response"
        ids = self._whole(row)
        if len(ids.prompt) > self.max_prompt_length and self.overlong == "drop":
            return _NO_TOKENS, f"a prompt over {self.max_prompt_length} tokens"
        prompt = self._end_of(ids.prompt)
        available = self.max_length - len(prompt)
        responses = {"chosen": ids.chosen, "rejected": ids.rejected}
        if responses["chosen"] == responses["rejected"]:
            return _NO_TOKENS, "equal responses"
        for side, response in responses.items():
            if len(response) <= available:
                continue
            if self.overlong == "drop":
                return _NO_TOKENS, f"prompt and {side!r} response over {self.max_length} tokens"
            responses[side] = self._cut(response, available)
        if responses["chosen"] == responses["rejected"]:
            return _NO_TOKENS, f"responses that are equal once cut to max_length, {self.max_length} tokens"
        if not prompt and min(map(len, responses.values())) < 2:
            return _NO_TOKENS, "a response of one token without a prompt, which nothing predicts"
        columns = {name: values[:available] for name, values in ids.columns.items()}
        return _TokenIds(prompt, responses["chosen"], responses["rejected"], columns), ""

    def _end_of(self, prompt: list[int]) -> list[int]:
        """The end of a prompt that is too long, behind its beginning token if it has one."""
        if len(prompt) <= self.max_prompt_length:
            return prompt
        begins = prompt[0] == self.tokenizer.bos_token_id and self.max_prompt_length > 1
        kept = self.max_prompt_length - begins
        return [*prompt[:begins], *prompt[len(prompt) - kept :]]

    def _check(self, row: dict[str, Any]) -> None:
        check_row(row)

    def _split(self, row: dict[str, Any]) -> dict[str, Any]:
        return with_own_prompt(row)

    def _whole(self, row: dict[str, Any]) -> _TokenIds:
        """The tokens of a row, of any length."""
        sides = conversations(row, self.tokenizer)
        (chosen, first), (rejected, other) = map(self._tokens, sides)
        # A token that spans the boundary belongs to its response, and then the prompt of both ends before it.
        prompt = shared_prefix_length(chosen[:first], rejected[:other])
        return _TokenIds(
            prompt=chosen[:prompt],
            chosen=self._ended(chosen[prompt:], sides[0]),
            rejected=self._ended(rejected[prompt:], sides[1]),
        )

    def _tokens(self, conversation: Conversation) -> tuple[list[int], int]:
        """A conversation's tokens, and how many of them belong to the prompt alone."""
        text, response = conversation.text, conversation.response
        options: dict[str, Any] = {"add_special_tokens": not conversation.templated}
        if not self.tokenizer.is_fast:
            ids = self.tokenizer(text, **options)["input_ids"]
            return ids, shared_prefix_length(ids, self.tokenizer(text[:response], **options)["input_ids"])
        encoded = self.tokenizer(text, return_offsets_mapping=True, **options)
        ids = encoded["input_ids"]
        ends = (place for place, (_, end) in enumerate(encoded["offset_mapping"]) if end > response)
        return ids, next(ends, len(ids))

    def _ended(self, ids: list[int], conversation: Conversation) -> list[int]:
        # A template may put white space after the end token; models were trained with it, so it stays.
        if conversation.templated and conversation.text.rstrip().endswith(self.tokenizer.eos_token):
            return ids
        return self._closed(ids)

    def _cut(self, ids: list[int], length: int) -> list[int]:
        """The beginning of a response, closed by the end token; `ids` ends with it too, perhaps before white space."""
        last_end = len(ids) - 1 - ids[::-1].index(self.tokenizer.eos_token_id)
        return ids[:length] if last_end < length else self._closed(ids[: length - 1])

    def _closed(self, ids: list[int]) -> list[int]:
        end = self.tokenizer.eos_token_id
        return ids if ids[-1:] == [end] else [*ids, end]


class _IdEncoder(_Encoder):
    """For rows that hold token ids."""

    _suffix = "_ids"

    def _check(self, row: dict[str, Any]) -> None:
        for name in TOKEN_IDS:
            check_ids(name, row[name], len(self.tokenizer))
        for name in self.token_columns:
            check_token_column(name, row[name], len(row[f"{name.partition('_')[0]}_ids"]))

    def _split(self, row: dict[str, Any]) -> dict[str, Any]:
        return row

    def _whole(self, row: dict[str, Any]) -> _TokenIds:
        return _TokenIds(
            prompt=row["prompt_ids"],
            chosen=row["chosen_ids"],
            rejected=row["rejected_ids"],
            columns={name: row[name] for name in self.token_columns},
        )

    def _cut(self, ids: list[int], length: int) -> list[int]:
        return ids[:length]


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "truncate",
    num_proc: int | None = None,
    token_columns: tuple[str, ...] = (),
) -> Dataset:
    """Tokenizes preference rows, or checks and cuts rows of token ids.

    The columns of the result are `prompt_ids`, `chosen_ids` and `rejected_ids`; `dataset_row`, the row of `dataset`;
    `length`, the tokens of the prompt and the longer response; and `token_row`, the row of the result. A response ends
    with the tokenizer's end token: it is appended unless the text ends with it, or a chat template closes the message
    with it, with or without white space after it. Prompt and response are tokenized together, as the model sees them; a
    token that spans the boundary belongs to the response. A prompt longer than `max_prompt_length` tokens keeps its
    beginning token and its end; a response that doesn't fit `max_length` keeps its beginning and the end token; or,
    with `overlong="drop"`, such rows are dropped. Rows with an empty response, with responses that are equal or become
    so by this, or with one that nothing predicts are always dropped.

    A warning says how many rows were dropped, and why. `num_proc` processes share the work. `token_columns` are numbers
    per response token, which rows of token ids must have as `chosen_NAME` and `rejected_NAME`; the result has them too.
    Such rows get no end token and lose none but by cutting.

    Raises:
        ValueError: a column is missing, a row is malformed (the message names it), no row is left, or the tokenizer has
            no end token or no chat template.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"the dataset is {type(dataset).__name__}; a datasets.Dataset is needed")
    columns = tuple(f"{side}_{name}" for name in token_columns for side in RESPONSES)
    are_ids = "chosen_ids" in dataset.column_names
    if columns and not are_ids:
        raise ValueError(
            f"the loss reads {', '.join(columns)}, numbers per token, which only rows of token ids have (chosen_ids, "
            f"...); the dataset has {', '.join(dataset.column_names)}"
        )
    needed = (*TOKEN_IDS, *columns) if are_ids else RESPONSES
    missing = [column for column in needed if column not in dataset.column_names]
    if missing:
        raise ValueError(f"the dataset lacks {', '.join(missing)}; it has {', '.join(dataset.column_names)}")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, with which responses must end")
    if not are_ids and isinstance(dataset[0]["chosen"], list) and tokenizer.chat_template is None:
        raise ValueError("the dataset holds chat messages but the tokenizer has no chat template")
    encoder = (_IdEncoder if are_ids else _Encoder)(tokenizer, max_length, max_prompt_length, overlong, columns)
    encoded = dataset.map(
        encoder,
        with_indices=True,
        remove_columns=dataset.column_names,
        # Not inferred: the first rows may all be dropped.
        features=Features({**_COLUMNS, **{name: List(Value("float32")) for name in columns}}),
        num_proc=None if num_proc is None else min(num_proc, len(dataset)),
        desc="Tokenizing preferences",
    )
    dropped = Counter(reason for reason in encoded["dropped"] if reason)
    if dropped:
        reasons = ", ".join(f"{count} with {reason}" for reason, count in dropped.most_common())
        if dropped.total() == len(dataset):
            raise ValueError(f"no row of the dataset is left: of {len(dataset)} rows, {reasons}")
        logger.warning("dropped %d of %d rows: %s", dropped.total(), len(dataset), reasons)
        encoded = encoded.filter(lambda reason: not reason, input_columns="dropped", desc="Dropping rows")
    return encoded.remove_columns("dropped").add_column("token_row", list(range(len(encoded))))


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads batches: the tokenizer's, or its end token if it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
