"""From data sets of preference rows, in any of their forms (docs/data.md), to data sets of token ids."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from datasets import Audio, Dataset, Features, Image, List, Value, Video
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from ..files import stream_digest
from ..options import RowOptions
from .code import CODE
from .encode import Encoded, Encoder, IdEncoder
from .forms import check_columns, column_mapping
from .rows import RESPONSES
from .summary import Summary, listed

logger = logging.getLogger(__name__)
_ROWS_PER_DIGEST = 1000
TOKEN_IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
_MASKS = ("chosen_mask", "rejected_mask")
TOKENS = {**{name: List(Value("int64")) for name in TOKEN_IDS}, **{name: List(Value("bool")) for name in _MASKS}}
FATE = {"dropped": Value("string"), "cut_prompt": Value("bool"), "cut_responses": Value("bool")}  # as `Encoded`
_COLUMNS = {**TOKENS, "dataset_row": Value("int64"), "length": Value("int64"), **FATE}


def tokens_digest(dataset: Dataset) -> str:
    """A digest of a tokenized dataset's tokens, which of them are learned, and nothing else."""
    columns = dataset.select_columns(list(TOKENS)).with_format("arrow")
    batches = columns.iter(batch_size=_ROWS_PER_DIGEST)
    lists = (batch[name].combine_chunks() for batch in batches for name in columns.column_names)
    numbers = (part for some in lists for part in (some.value_lengths(), some.flatten()))
    return stream_digest(
        np.ascontiguousarray(part.to_numpy(zero_copy_only=False), dtype=np.int64).data for part in numbers
    )


@dataclass
class RowPairs:
    """Turns batches of rows into batches of pairs; some rows have several, those that can't be used an empty one.

    Attributes:
        token_columns: names of numbers per response token that the rows have.
    """

    encoder: Encoder
    token_columns: tuple[str, ...]
    code: str = CODE  # so that tokens that older code made are not taken from the cache of `datasets`

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values)) for values in zip(*batch.values())]
        pairs = [(index, encoded) for index, row in zip(indices, rows) for encoded in self.of_row(row, index)]
        table: dict[str, list[Any]] = {name: [] for name in (*_COLUMNS, *_of_sides(self.token_columns))}
        for index, encoded in pairs:
            for name, value in self.values(encoded, index).items():
                table[name].append(value)
        return table

    def of_row(self, row: dict[str, Any], index: int) -> list[Encoded]:
        """What becomes of the pairs of a row; `index` is its number.

        Raises:
            ValueError: the row is malformed; the message names it.
        """
        try:
            return list(self.encoder.pairs(row))
        except (ValueError, TemplateError) as error:  # a template may refuse the order of roles, for example
            raise ValueError(f"row {index} of the dataset: {error}") from error

    def values(self, encoded: Encoded, index: int) -> dict[str, Any]:
        """A pair of row `index` as a row of the tokenized data, with the columns of `FATE`."""
        values: dict[str, Any] = {name: [] for name in (*TOKENS, *_of_sides(self.token_columns))}
        values |= {"dataset_row": index, "length": 0}
        values |= {name: getattr(encoded, name) for name in FATE}
        if encoded.pair is None:
            return values
        values |= {"prompt_ids": encoded.pair.prompt, "length": encoded.pair.length}
        for side, response in zip(RESPONSES, (encoded.pair.chosen, encoded.pair.rejected)):
            values |= {f"{side}_ids": response.ids, f"{side}_mask": response.mask}
            values |= {f"{side}_{name}": response.columns[name] for name in self.token_columns}
        return values


def tokenize_preferences(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    overlong: str = "truncate",
    num_proc: int | None = None,
    token_columns: tuple[str, ...] = (),
    *,
    columns: Mapping[str, str | None] | None = None,
    pairing: str = "best_worst",
    pairs_per_prompt: int | None = None,
    learned_turns: str = "assistant",
) -> Dataset:
    """Tokenizes preference rows, in any form of docs/data.md, or checks and cuts rows of token ids.

    The columns of the result are `prompt_ids`, `chosen_ids` and `rejected_ids`; `chosen_mask` and `rejected_mask`, of
    every response token whether the loss sees it; `dataset_row`, the row of `dataset`; `length`, the tokens of the
    prompt and the longer response; and `token_row`, the row of the result. A response ends with the tokenizer's end
    token: it is appended unless the text ends with it, or a chat template closes the message with it, with or without
    white space after it. Prompt and response are tokenized together, as the model sees them; a token that spans the
    boundary belongs to the response.

    A prompt longer than `max_prompt_length` tokens keeps its beginning token and its end; a response that doesn't fit
    `max_length` keeps its beginning and the end token; or, with `overlong="drop"`, such rows are dropped. Rows with an
    empty response, with responses that are equal or become so by this, or with one that nothing predicts are always
    dropped. A warning says how many rows were dropped, and why.

    Args:
        dataset: rows of preferences.
        tokenizer: of the policy.
        max_length: of prompt and response together, in tokens.
        max_prompt_length: in tokens.
        overlong: "truncate" or "drop".
        num_proc: processes that share the work.
        token_columns: numbers per response token, which rows of token ids must have as `chosen_NAME` and
            `rejected_NAME`; the result has them too. Such rows get no end token and lose none but by cutting.
        columns: the data's names of columns by the names here; None says that there is no such column.
        pairing, pairs_per_prompt: which pairs of a row's scored or ranked responses to make, and how many at most (see
            `data.ranked.pairs_of`).
        learned_turns: "assistant": in a response of several turns the others are context; "all": all are learned.

    Raises:
        ValueError: a column is missing, a row is malformed (the message names it), no row is left, or the tokenizer has
            no end token or no chat template.
    """
    options = RowOptions(
        columns=None if columns is None else dict(columns),
        pairing=pairing,
        pairs_per_prompt=pairs_per_prompt,
        learned_turns=learned_turns,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        overlong=overlong,
        dataset_num_proc=num_proc,
    )
    encoded, summary = tokenize_rows(dataset, tokenizer, options, token_columns)
    if summary.dropped:
        dropped = summary.dropped.total()
        logger.warning("dropped %d of %d: %s", dropped, dropped + summary.pairs, listed(summary.dropped))
    return encoded


def tokenize_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, options: RowOptions, token_columns: tuple[str, ...] = ()
) -> tuple[Dataset, Summary]:
    """What `tokenize_preferences` does, and what became of the rows."""
    if not isinstance(dataset, Dataset):
        raise TypeError(f"the dataset is {type(dataset).__name__}; a datasets.Dataset is needed")
    if len(dataset) == 0:
        raise ValueError("the dataset is empty")
    for name, feature in dataset.features.items():
        if _is_media(feature):
            raise ValueError(f"the column {name!r} holds media; only text is supported: remove it")
    if dataset.format["type"] != "custom":  # a transform is what the rows are, other formats are how they look
        dataset = dataset.with_format(None)
    num_proc = options.dataset_num_proc
    encoded = dataset.map(
        RowPairs(row_encoder(dataset[0], tokenizer, options, token_columns), token_columns),
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        # Not inferred: the first rows may all be dropped.
        features=Features({**_COLUMNS, **{name: List(Value("float32")) for name in _of_sides(token_columns)}}),
        num_proc=None if num_proc is None else min(num_proc, len(dataset)),
        desc="Tokenizing preferences",
    ).with_format(None)
    dropped = Counter(reason for reason in encoded["dropped"] if reason)
    if dropped.total() == len(encoded):
        raise ValueError(f"no row of the dataset is left: of {len(dataset)} rows, {listed(dropped)}")
    if dropped:
        encoded = encoded.filter(lambda reason: not reason, input_columns="dropped", desc="Dropping rows")
    summary = _summary(encoded, len(dataset), dropped)
    return encoded.remove_columns(list(FATE)).add_column("token_row", list(range(len(encoded)))), summary


def row_encoder(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, options: RowOptions, token_columns: tuple[str, ...]
) -> Encoder:
    """What encodes the rows of a data set; `row` is one of them.

    Raises:
        ValueError: the tokenizer has no end token, or the rows lack a column.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token, with which responses must end")
    own = {item.name: getattr(options, item.name) for item in fields(RowOptions)}
    options = RowOptions(**{**own, "dataset_num_proc": None})  # no others: caches of `datasets` go by what is in here
    columns = column_mapping(options.columns)
    if check_row(row, columns, token_columns):
        return IdEncoder(tokenizer, options, columns, token_columns)
    return Encoder(tokenizer, options, columns)


def check_row(row: Mapping[str, Any], columns: Mapping[str, str | None], token_columns: tuple[str, ...]) -> bool:
    """Checks that a row has the columns that are needed; returns whether it holds token ids.

    Args:
        columns: the data's names of columns by ours.
        token_columns: numbers per response token that the loss reads.

    Raises:
        ValueError: it lacks some; the message names them.
    """
    check_columns(columns, list(row))
    names = {*row, *columns} - {ours for ours, theirs in columns.items() if theirs is None}
    are_ids, of_tokens = "chosen_ids" in names, _of_sides(token_columns)
    if of_tokens and not are_ids:
        raise ValueError(
            f"the loss reads {', '.join(of_tokens)}, numbers per token, which only rows of token ids have (chosen_ids, "
            f"...); the dataset has {', '.join(row)}"
        )
    needed = (*TOKEN_IDS, *of_tokens) if are_ids else (() if "responses" in names else RESPONSES)
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"the dataset lacks {', '.join(missing)}; it has {', '.join(row)}. Columns under other names are mapped "
            f"with columns={{{missing[0]!r}: ...}}"
        )
    return are_ids


def _is_media(feature: Any) -> bool:
    entries = getattr(feature, "feature", None)
    return isinstance(feature, (Audio, Image, Video)) or (entries is not None and _is_media(entries))


def _of_sides(token_columns: tuple[str, ...]) -> list[str]:
    return [f"{side}_{name}" for name in token_columns for side in RESPONSES]


def _summary(encoded: Dataset, rows: int, dropped: Counter[str]) -> Summary:
    table = encoded.with_format("arrow")[:]
    lengths = [table[name].combine_chunks().value_lengths().to_numpy() for name in TOKEN_IDS]
    masks = [table[name].combine_chunks().flatten() for name in _MASKS]
    return Summary(
        rows,
        dropped,
        cut_prompts=int(np.count_nonzero(table["cut_prompt"].to_numpy())),
        cut_responses=int(np.count_nonzero(table["cut_responses"].to_numpy())),
        context=sum(len(mask) - (mask.true_count or 0) for mask in masks),
        prompts=lengths[0],
        chosen=lengths[1],
        rejected=lengths[2],
    )


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that pads batches: the tokenizer's, or its end token if it has none."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
