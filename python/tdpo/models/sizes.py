"""What a model has room for: positions against `max_length`, token ids against its embeddings."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..data.tokenize import TOKEN_IDS, padding_token
from .causal_lm import unwrap_peft
from .sharding import is_tensor_parallel

logger = logging.getLogger(__name__)


def check_positions(name: str, model: Any, option: str, length: int | None) -> None:
    """Refuses lengths beyond a table of positions; warns of rotary positions beyond those that a model was made for.

    Args:
        name: of the model's argument.
        option, length: the option that limits sequences, and its value in tokens; None has no limit.

    Raises:
        ValueError: the table is shorter.
    """
    if length is None:
        return
    table, made_for = position_table(model), getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if table is not None and length > table:
        raise ValueError(
            f"{option} is {length:,}, but {name} has {table:,} positions: set {option} to {table:,} or less"
        )
    if _is_rotary(model) and made_for is not None and length > made_for:
        logger.warning(
            "%s is %d, but %s was made for %d positions: what it says of longer texts may be poor",
            *(option, length, name, made_for),
        )


def position_table(model: Any) -> int | None:
    """The length of a model's table of positions, in tokens; None where it has no table."""
    if _is_rotary(model):
        return None
    config = model.config.get_text_config()
    sizes = [*_learned_positions(model, config), *_fixed_positions(model, config)]
    return min(sizes, default=getattr(config, "max_seq_len", None))  # MPT makes its table in every call


def _is_rotary(model: nn.Module) -> bool:
    return any(name.endswith("inv_freq") for name, _ in model.named_buffers())


_POSITIONS = re.compile(r"(^|_)(pos|position|positions|wpe)(_|$)")


def _learned_positions(model: Any, config: Any) -> Iterator[int]:
    """The sizes of embeddings of positions, without the first rows that some families keep for padding."""
    for name, module in _text_parts(model, config, model.named_modules()):
        if isinstance(module, nn.Embedding) and _POSITIONS.search(name.rpartition(".")[2]):
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            yield module.num_embeddings - getattr(module, "offset", padding)


def _fixed_positions(model: Any, config: Any) -> Iterator[int]:
    """The sizes of tables of sines; tables that grow on demand have other names."""
    for name, table in _text_parts(model, config, model.named_buffers()):
        if table.ndim == 2 and len(table) > 1 and _POSITIONS.search(name.rpartition(".")[2]):
            yield len(table)


def _text_parts(model: Any, config: Any, named: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The parts of a model that read text: all, or in a model of images those in the module of its token embedding."""
    if config is model.config:
        return named
    embedding = model.get_input_embeddings()
    place = next((name for name, module in model.named_modules() if module is embedding), "").rpartition(".")[0]
    return ((name, part) for name, part in named if name.startswith(place))


def _embedded_ids(model: Any) -> int | None:
    """The number of token ids that a model both embeds and predicts; None if unknown."""
    weights = [getattr(part, "weight", None) for part in (model.get_input_embeddings(), model.get_output_embeddings())]
    rows = [getattr(weight, "ds_shape", weight.shape)[0] for weight in weights if weight is not None]
    if getattr(model, "is_quantized", False) or is_tensor_parallel(model):  # whose weights may have other shapes
        return model.config.get_text_config().vocab_size
    return min(rows, default=None)


def check_vocabulary(name: str, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuses a tokenizer with words, padding, beginning or end tokens that the model has no embedding for.

    Other special tokens may lack one: a tokenizer that a family shares may have tokens of images. Whether the data use
    them is checked by `check_token_ids`.
    """
    rows = _embedded_ids(model)
    if rows is None:
        return
    ids = {
        "padding token": padding_token(tokenizer),
        "bos_token": tokenizer.bos_token_id,
        "eos_token": tokenizer.eos_token_id,
    }
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    words = {word: number for word, number in tokenizer.get_vocab().items() if number not in special}
    if words:
        last = max(words, key=words.__getitem__)
        ids[f"token {last!r}"] = words[last]
    for what, number in ids.items():
        if number is not None and not 0 <= number < rows:
            raise ValueError(
                f"the tokenizer's {what} has the id {number}, but {name} embeds {rows:,} tokens: {_RESIZE}"
            )


def embedded_ids(**models: nn.Module | None) -> dict[str, int]:
    """How many token ids models embed and predict, by the names of their arguments; where that is unknown, none."""
    sizes = {name: _embedded_ids(unwrap_peft(model)) for name, model in models.items() if model is not None}
    return {name: rows for name, rows in sizes.items() if rows is not None}


def check_token_ids(dataset: Any, embedded: dict[str, int]) -> None:
    """Checks the token ids of a tokenized dataset, whose rows may have been given as token ids.

    Args:
        dataset: with some of the columns of `TOKEN_IDS`; or a dict of such; or None.
        embedded: how many ids the models embed, by the names of their arguments.

    Raises:
        ValueError: a model has no embedding for an id; the message names the row and the column.
    """
    for split in dataset.values() if isinstance(dataset, dict) else [dataset]:
        if isinstance(split, Dataset):  # of streams, `check_pair` checks what is read
            for name, rows in embedded.items():
                _check_ids(split, name, rows)


def check_pair(embedded: dict[str, int], pair: dict[str, Any]) -> None:
    """The same for one tokenized pair."""
    for name, rows in embedded.items():
        for column in TOKEN_IDS:
            wrong = [token for token in pair[column] if not 0 <= token < rows]
            if wrong:
                raise _not_embedded(pair["dataset_row"], wrong[0], column, name, rows)


def _check_ids(dataset: Dataset, name: str, rows: int) -> None:
    columns = [column for column in TOKEN_IDS if column in dataset.column_names]
    first = 0
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
        for column in columns:
            lists = batch[column].combine_chunks()
            ids = lists.flatten().to_numpy(zero_copy_only=False)
            (wrong,) = ((ids < 0) | (ids >= rows)).nonzero()
            if len(wrong):
                ends = lists.value_lengths().to_numpy(zero_copy_only=False).cumsum()
                row = first + int(ends.searchsorted(wrong[0], side="right"))
                raise _not_embedded(dataset[row].get("dataset_row", row), ids[wrong[0]], column, name, rows)
        first += len(lists)


def _not_embedded(row: int, token: int, column: str, name: str, rows: int | None) -> ValueError:
    return ValueError(
        f"row {row} of the dataset has the token id {token} in {column!r}, but {name} embeds {rows:,} tokens: {_RESIZE}"
    )


_ROWS_AT_ONCE = 1000
_RESIZE = "use the model's own tokenizer, or resize the model's embeddings (resize_token_embeddings)"
