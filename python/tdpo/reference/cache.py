"""The reference's hidden states on disk: computed once, after which only the reference's head is needed.

A cache is a folder; nothing in it is ever unpickled:

    header.json        fingerprints of the reference and the data, sizes, the size and digest of every shard that is
                       done, and a digest of all that
    00000.safetensors  a shard: the last hidden states that predict the response tokens of 64 rows, (tokens, D), as
                       stored_states.py packs them: of every row the chosen response before the rejected one

Where a response begins in its shard is not stored: the tokenized data, which a cache is opened with, say it.

It is written shard by shard; an interrupted run resumes after the last one that the header lists. A process compares a
shard with its digest before it first reads from it. A cache of other weights, other tokens or another precision, stored
or computed in (that of autocast, where it is on), is refused, and so is a truncated or corrupt one.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from itertools import accumulate
from pathlib import Path
from typing import Any, TypedDict, cast

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..data.collator import PreferenceCollator, Sequence
from ..data.rows import RESPONSES
from ..data.tokenize import TOKENS, tokens_digest
from ..files import allocate, digest, file_digest, read_sealed, write_bytes, write_sealed
from ..models.causal_lm import CausalLM
from ..models.noise import evaluation_mode
from ..models.probes import depends_on_the_batch
from ..progress import progress_bar
from .digests import reference_digest
from .stored_states import STORED_STATES, StoredStates

FORMAT = 6
_SHARD_ROWS = 64
_RESERVED = "reserved.bin"  # holds the space of the shards that are not done


# What a cache was made from, under the names that header.json and messages use.
Source = TypedDict(
    "Source", {"format": int, "dtype": str, "autocast": str, "reference weights": str, "tokenized data": str}
)


class Header(Source):
    """header.json."""

    rows: int
    width: int
    shards: list[tuple[int, str]]  # bytes and digest of every one that is done


def _source(model: nn.Module, dataset: Dataset, dtype: str) -> Source:
    device = next(iter(model.parameters())).device.type
    return {
        "format": FORMAT,
        "dtype": dtype,
        "autocast": str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None),
        "reference weights": reference_digest(model),
        "tokenized data": tokens_digest(dataset),
    }


def _check_source(folder: str | Path, header: Header, source: Source) -> None:
    differences = [name for name, value in source.items() if header.get(name) != value]
    if differences:
        raise ValueError(_with_advice(folder, f"was made with another {' and another '.join(differences)}"))


def _response_offsets(dataset: Dataset) -> np.ndarray:
    """Where each response begins among all response tokens that are learned, (2 rows + 1), and the end."""
    columns = dataset.select_columns(list(TOKENS))
    lengths = [len(Sequence.of(row, side).learned) for row in columns for side in RESPONSES]
    return np.array([0, *accumulate(lengths)])


class ReferenceCache:
    """Reads a finished cache.

    Raises:
        ValueError: the cache does not exist, is not finished, is corrupt, or was made from something else; the message
            says which, and how to rebuild it.
    """

    def __init__(self, folder: str | Path, header: Header, offsets: np.ndarray):
        self.folder, self.header, self._offsets = Path(folder), header, offsets
        self._checked: set[int] = set()  # shards
        _check_sizes(self.folder, header)

    @classmethod
    def open(cls, folder: str | Path, model: nn.Module, dataset: Dataset, dtype: str) -> ReferenceCache:
        """Opens the cache in `folder` after checking that it is of this reference and of these tokens."""
        header = _read_header(folder)
        if header is None:
            raise ValueError(_with_advice(folder, "does not exist"))
        _check_source(folder, header, _source(model, dataset, dtype))
        if _rows_done(header) < header["rows"]:
            raise ValueError(_with_advice(folder, f"is not finished: {_rows_done(header)} of {header['rows']} rows"))
        return cls(folder, header, _response_offsets(dataset))

    @property
    def dtype(self) -> torch.dtype:
        """The precision that hidden states are stored in."""
        return _storage(self.header).dtype

    def hidden(self, row: int, side: str) -> Tensor:
        """The hidden states of one response, (tokens, D)."""
        number, sequence = row // _SHARD_ROWS, 2 * row + RESPONSES.index(side)
        path, first = _shard(self.folder, number), self._offsets[2 * _SHARD_ROWS * number]
        if number not in self._checked:
            if file_digest(path) != self.header["shards"][number][1]:
                raise ValueError(_with_advice(self.folder, f"is corrupt: {path.name} does not match its digest"))
            self._checked.add(number)
        begin, end = (int(offset - first) for offset in self._offsets[sequence : sequence + 2])
        with safe_open(path, framework="pt") as file:
            return _storage(self.header).unpack({name: file.get_slice(name)[begin:end] for name in file.offset_keys()})


def cache_reference(
    folder: str | Path,
    model: nn.Module,
    dataset: Dataset,
    pad_token_id: int,
    dtype: str = "bfloat16",
    batch: int = 8,
    *,
    progress: bool = True,
) -> ReferenceCache:
    """Fills the cache in `folder` with the reference's hidden states of a tokenized dataset, or resumes filling it.

    Args:
        folder: created if it doesn't exist; a finished cache of the same reference and tokens is opened as it is.
        model: the reference; where autocast is on, it computes in that precision.
        dataset: from `tokenize_preferences`.
        pad_token_id: pads the batches that the reference reads.
        dtype: bfloat16, float16, float32 or float8; what storing costs the KL is in docs/performance.md.
        batch: rows at a time.
        progress: show a bar.

    Raises:
        ValueError: the folder holds a cache of something else or a corrupt one, or `dtype` is unknown.
        OSError: the disk can't hold the cache, whose size is printed first; its space is reserved before the reference
            runs.
    """
    if dtype not in STORED_STATES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(STORED_STATES)}")
    folder, reference = Path(folder), CausalLM.of(model)
    if reference.fallback_reason is not None:
        raise ValueError(f"the reference's hidden states can't be cached: {reference.fallback_reason}")
    source = _source(model, dataset, dtype)
    header: Header = {
        **source,
        "rows": len(dataset),
        "width": reference.weight.shape[1],
        "shards": [],
    }
    existing = _read_header(folder)
    if existing is not None:
        _check_source(folder, existing, source)
        header = existing
    offsets = _response_offsets(dataset)
    if existing is None:
        _reserve(folder, header, offsets)
        write_sealed(folder / "header.json", dict(header))
    if existing is None or _rows_done(header) < header["rows"]:
        alone = depends_on_the_batch(reference, max(dataset["length"], default=0)) is not None
        collator = PreferenceCollator(pad_token_id, row_by_row=alone)
        _fill(folder, header, dataset, offsets, reference, collator, batch=batch, progress=progress)
    return ReferenceCache(folder, header, offsets)


def _reserve(folder: Path, header: Header, offsets: np.ndarray) -> None:
    """Says how much space the cache takes, and reserves it in a file that shrinks as the shards are written."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in [*folder.glob("*.safetensors"), folder / _RESERVED]:
        path.unlink(missing_ok=True)  # without a header it is what a killed process left
    size, free = _bytes_after(0, header, offsets), shutil.disk_usage(folder).free
    print(
        f"The reference cache {folder} takes {size / 1e9:,.2f} GB ({int(offsets[-1]):,} response tokens of "
        f"{_storage(header).bytes_per_token(header['width']):,} bytes); {free / 1e9:,.2f} GB are free.",
        file=sys.stderr,
        flush=True,
    )
    if size > free:
        raise OSError(errno.ENOSPC, f"the cache needs {size:,} bytes, but {free:,} are free", str(folder))
    allocate(folder / _RESERVED, size)


@torch.no_grad()
def _fill(
    folder: Path,
    header: Header,
    dataset: Dataset,
    offsets: np.ndarray,
    reference: CausalLM,
    collate: PreferenceCollator,
    *,
    batch: int,
    progress: bool,
) -> None:
    """Runs the reference over the rows of the shards that are not done, `batch` rows at a time."""
    _check_sizes(folder, header)
    total = header["rows"]
    with (
        evaluation_mode(reference.model),
        progress_bar("Caching the reference", total, "pairs", done=_rows_done(header), shown=progress) as bar,
    ):
        while (done := _rows_done(header)) < total:
            end, parts = min(total, done + _SHARD_ROWS), []
            for first in range(done, end, batch):
                rows = range(first, min(end, first + batch))
                parts.append(_states(reference, collate([dataset[row] for row in rows]), _storage(header)))
                bar.update(len(rows))
            content = save({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            if (folder / _RESERVED).exists():
                os.truncate(folder / _RESERVED, _bytes_after(end, header, offsets))
            write_bytes(_shard(folder, len(header["shards"])), content)
            header["shards"].append((len(content), digest(content)))
            write_sealed(folder / "header.json", dict(header))
    (folder / _RESERVED).unlink(missing_ok=True)


def _states(reference: CausalLM, batch: dict[str, Any], storage: StoredStates) -> dict[str, Tensor]:
    """The hidden states of the responses as they are stored: of every row the chosen one before the rejected one."""
    device = reference.weight.device
    tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    sequences = tensors["rows"].split(batch["row_lengths"])  # chosen of all rows, then rejected
    pairs = len(sequences) // 2
    places = torch.cat([torch.cat(pair) for pair in zip(sequences[:pairs], sequences[pairs:])])
    return storage.pack(reference.hidden(**{**batch, **tensors}).flatten(0, 1)[places])


def _shard(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.safetensors"


def _rows_done(header: Header) -> int:
    return min(header["rows"], len(header["shards"]) * _SHARD_ROWS)


def _storage(header: Header) -> StoredStates:
    return STORED_STATES[header["dtype"]]


def _bytes_after(row: int, header: Header, offsets: np.ndarray) -> int:
    """The bytes of the hidden states of `row` and all later rows."""
    return int(offsets[-1] - offsets[2 * row]) * _storage(header).bytes_per_token(header["width"])


def _check_sizes(folder: Path, header: Header) -> None:
    """Before a file is mapped: to read a mapping beyond the file's end would kill the process."""
    for number, (size, _) in enumerate(header["shards"]):
        path = _shard(folder, number)
        if not path.is_file():
            raise ValueError(_with_advice(folder, f"is corrupt: {path.name} is missing"))
        if path.stat().st_size != size:
            raise ValueError(
                _with_advice(folder, f"is corrupt: {path.name} has {path.stat().st_size:,} bytes, not {size:,}")
            )


def _read_header(folder: str | Path) -> Header | None:
    path = Path(folder, "header.json")
    if not path.exists():
        return None
    try:
        return cast(Header, read_sealed(path))
    except ValueError as error:
        raise ValueError(_with_advice(folder, f"is corrupt: {error}")) from error


def _with_advice(folder: str | Path, problem: str) -> str:
    return (
        f"the reference cache {folder} {problem}; to rebuild it, remove the folder and run `tdpo cache-reference` with "
        "the same options"
    )
