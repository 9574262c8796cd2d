"""From streams of preference rows, in any of their forms (docs/data.md), to streams of token ids."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import datasets
import fsspec
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase

from ..options import RowOptions
from .summary import listed
from .tokenize import FATE, RowPairs, row_encoder

if TYPE_CHECKING:
    from ..config import TDPOConfig

logger = logging.getLogger(__name__)
SHUFFLED_ROWS = 1000  # that a training's shuffle buffer holds
_NUMBER = "dataset_row"


class Training(NamedTuple):
    """How a training reads a stream: again and again.

    Attributes:
        seed: of the order, another in every pass; None reads the rows as they come.
    """

    seed: int | None

    @classmethod
    def of(cls, args: TDPOConfig) -> Training:
        """What the options ask for."""
        if args.train_sampling_strategy == "sequential":
            return cls(None)
        return cls(args.seed if args.data_seed is None else args.data_seed)


@dataclass(eq=False)
class PreferenceStream(IterableDataset):
    """Pairs of a stream of rows, tokenized as they are read: see `tokenize_stream`.

    It is read by one process or worker as a whole. Where several train, each reads all of it and takes its share
    (`accelerate.data_loader.IterableDatasetShard`), so that all have as many batches and agree on every pair's number.

    Attributes:
        rows: with their numbers.
        pairs: makes pairs of a row.
        columns: of the first row; other rows without one have null there, as in a table.
        training: it is read so; None ends with the rows.
        check: is called with every pair, to refuse it.
    """

    rows: datasets.IterableDataset
    pairs: RowPairs
    columns: tuple[str, ...]
    training: Training | None
    check: Callable[[dict[str, Any]], None] | None = None
    _told: int = field(default=0, repr=False)  # so many dropped rows, in this process

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """The pairs, as rows of `tokenize_preferences` are.

        Raises:
            ValueError: a row can't be read or is malformed, no pair is left of a whole pass, or `check` refuses one.
        """
        for epoch in range(1) if self.training is None else count():
            yield from self._one_pass(epoch)

    def _one_pass(self, epoch: int) -> Iterator[dict[str, Any]]:
        rows, kept = 0, 0
        dropped: Counter[str] = Counter()
        for row in self._read(epoch):
            rows += 1
            number = row.pop(_NUMBER)
            for encoded in self.pairs.of_row({**dict.fromkeys(self.columns), **row}, number):
                if encoded.pair is None:
                    dropped[encoded.dropped] += 1
                    self._tell(dropped, rows)
                    continue
                values = self.pairs.values(encoded, number)
                pair = {name: value for name, value in values.items() if name not in FATE} | {"token_row": kept}
                if self.check is not None:
                    self.check(pair)
                kept += 1
                yield pair
        if not kept:
            raise ValueError(f"no row of the dataset is left: of {rows} rows, {listed(dropped)}")

    def _read(self, epoch: int) -> Iterator[dict[str, Any]]:
        rows = self.rows.with_format(None)  # a copy: another iteration may be in another epoch
        if self.training is not None and self.training.seed is not None:
            rows.set_epoch(epoch)  # which shuffles the files of any stream
        if get_worker_info() is not None:
            fsspec.asyn.reset_lock()  # the thread that reads remote files did not survive the fork
        return _rows_of(rows)

    def _tell(self, dropped: Counter[str], rows: int) -> None:
        """Warns at 1, 10, 100, ... dropped rows, once for each number."""
        total = dropped.total()
        if total >= max(1, 10 * self._told):
            self._told = total
            logger.warning("dropped %d of the first %d rows read: %s", total, rows, listed(dropped))


def tokenize_stream(
    dataset: datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    token_columns: tuple[str, ...] = (),
    training: Training | None = None,
) -> PreferenceStream:
    """Tokenizes a stream of preference rows as `tokenize_preferences` does a dataset, while it is read.

    Only the first row is read here. `dataset_row` is a row's number in the dataset, or in the order of the pass where a
    dataset of several files is shuffled; `token_row` is a pair's number among those that the pass keeps. Dropped rows
    are told as they come, in warnings at 1, 10, 100, ... of them.

    Args:
        dataset: the same rows in the same order on every process and whenever it is read.
        training: the stream is for training: it has no end, and with a seed its rows pass a shuffle buffer.

    Raises:
        ValueError: a column is missing, the stream is empty or already split over processes, or the tokenizer has no
            end token.
    """
    if getattr(dataset, "_distributed", None) is not None:  # datasets has no public name for it
        raise ValueError(
            "the dataset is one process's share (split_dataset_by_node): give all of it, and the trainer shares it out"
        )
    rows = dataset.with_format(None)
    first = next(_rows_of(rows), None)
    if first is None:
        raise ValueError("the dataset is empty")
    pairs = RowPairs(row_encoder(first, tokenizer, options, token_columns), token_columns)
    if training is None or training.seed is None:
        rows = _numbered(rows)
    elif rows.num_shards == 1:
        rows = _numbered(rows).shuffle(seed=training.seed, buffer_size=SHUFFLED_ROWS)
    else:  # files are read by turns, each with numbers of its own
        rows = _numbered(rows.shuffle(seed=training.seed, buffer_size=SHUFFLED_ROWS))
    return PreferenceStream(rows, pairs, tuple(first), training)


def _rows_of(dataset: datasets.IterableDataset) -> Iterator[dict[str, Any]]:
    source = dataset.iter(batch_size=1)  # unlike `iter(dataset)` in the same order in a worker as without one
    for read in count():
        try:
            row = {name: value for name, (value,) in next(source).items()}
        except StopIteration:
            return
        except Exception as error:  # every format raises its own errors; `datasets` gives the reason in the cause
            reason = " ".join(str(error.__cause__ or error).split())
            raise ValueError(f"the dataset could not be read on behind {read} rows: {reason}") from error
        yield row


def _numbered(rows: datasets.IterableDataset) -> datasets.IterableDataset:
    return rows.map(_with_number, with_indices=True)


def _with_number(row: dict[str, Any], number: int) -> dict[str, Any]:
    return {**row, _NUMBER: number}


def is_stream(data: Any) -> bool:
    """Whether an argument of a trainer is a stream, or a dict of which one is."""
    return any(map(is_stream, data.values())) if isinstance(data, dict) else isinstance(data, datasets.IterableDataset)
