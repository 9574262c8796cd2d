"""The reference's hidden states on disk: computed once, after which only the reference's head is needed.

A cache is a folder of plain arrays with a JSON header; nothing in it is ever unpickled:

    header.json    fingerprints of the reference and the data, sizes, the number of rows done, the digest of their
                   checksums, and a digest of all that
    hidden.bin     the last hidden states that predict the response tokens, (tokens, D), each token as stored_states.py
                   packs it: of every row the chosen response before the rejected one
    checksums.bin  uint32 (rows): CRC-32 of a row's bytes in hidden.bin, checked whenever the row is read

Where a response begins in hidden.bin is not stored: the tokenized data, which a cache is opened with, say it.

It is written row by row; an interrupted run resumes at the last row that the header counts. A cache of other weights,
other tokens or another precision, stored or computed in (that of autocast, where it is on), is refused, and so is a
truncated or corrupt one.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
import zlib
from pathlib import Path
from typing import Literal, TypedDict, cast

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data.collator import PreferenceCollator
from ..data.tokenize import tokens_digest
from ..files import allocate, digest, read_sealed, write_sealed
from ..models.causal_lm import CausalLM, unwrap_peft
from .stored_states import STORED_STATES, StoredStates

FORMAT = 3
_CHECKSUM = np.dtype("<u4")
_ROWS_PER_SAVE = 64  # rows between two updates of the header
_ROWS_PER_COUNT = 256  # rows whose response tokens are counted at a time


# What a cache was made from, under the names that header.json and messages use.
Source = TypedDict(
    "Source", {"format": int, "dtype": str, "autocast": str, "reference weights": str, "tokenized data": str}
)


class Header(Source):
    """header.json."""

    rows: int
    width: int
    done: int
    checksums: str  # digest of the checksums of the rows done


def _source(model: nn.Module, dataset: Dataset, dtype: str) -> Source:
    device, weights = next(iter(model.parameters())).device.type, hashlib.blake2b(digest_size=16)
    for name, value in unwrap_peft(model).state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {
        "format": FORMAT,
        "dtype": dtype,
        "autocast": str(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None),
        "reference weights": weights.hexdigest(),
        "tokenized data": tokens_digest(dataset),
    }


def _check_source(folder: str | Path, header: Header, source: Source) -> None:
    differences = [name for name, value in source.items() if header.get(name) != value]
    if differences:
        raise ValueError(_with_advice(folder, f"was made with another {' and another '.join(differences)}"))


def _response_offsets(dataset: Dataset) -> np.ndarray:
    """Where each response begins in hidden.bin, (2 rows + 1), and where the last one ends."""
    collate = PreferenceCollator(pad_token_id=0, padding_free=True)  # it decides which response tokens count
    lengths = [np.zeros(1, dtype=np.int64)]
    for first in range(0, len(dataset), _ROWS_PER_COUNT):
        rows = [dataset[row] for row in range(first, min(first + _ROWS_PER_COUNT, len(dataset)))]
        chosen, rejected = collate(rows)["cu_seqlens"].diff().view(2, -1)
        lengths.append(torch.stack([chosen, rejected], dim=1).flatten().numpy())
    return np.concatenate(lengths).cumsum()


class ReferenceCache:
    """Reads a finished cache.

    Raises:
        ValueError: the cache does not exist, is not finished, is corrupt, or was made from something else; the message
            says which, and how to rebuild it.
    """

    def __init__(self, folder: str | Path, header: Header, offsets: np.ndarray):
        self.folder, self.header, self._offsets = Path(folder), header, offsets
        _check_size(self.folder / "hidden.bin", _hidden_bytes(header, offsets))
        self._checksums = _read_checksums(self.folder, header)
        self._hidden = _map_hidden(self.folder, header, offsets, "r")

    @classmethod
    def open(cls, folder: str | Path, model: nn.Module, dataset: Dataset, dtype: str) -> ReferenceCache:
        """Opens the cache in `folder` after checking that it is of this reference and of these tokens."""
        header = _read_header(folder)
        if header is None:
            raise ValueError(_with_advice(folder, "does not exist"))
        _check_source(folder, header, _source(model, dataset, dtype))
        if header["done"] != header["rows"]:
            raise ValueError(_with_advice(folder, f"is not finished: {header['done']} of {header['rows']} rows"))
        return cls(folder, header, _response_offsets(dataset))

    def hidden(self, row: int, side: str) -> Tensor:
        """The hidden states of one response, (tokens, D), after a check of the row's checksum."""
        begin, middle, end = (int(offset) for offset in self._offsets[2 * row : 2 * row + 3])
        if zlib.crc32(self._hidden[begin:end].tobytes()) != self._checksums[row]:
            raise ValueError(_with_advice(self.folder, f"is corrupt: row {row} does not match its checksum"))
        stored = self._hidden[begin:middle] if side == "chosen" else self._hidden[middle:end]
        return _storage(self.header).unpack(stored)


def cache_reference(
    folder: str | Path, model: nn.Module, dataset: Dataset, pad_token_id: int, dtype: str = "bfloat16", batch: int = 8
) -> ReferenceCache:
    """Fills the cache in `folder` with the reference's hidden states of a tokenized dataset, or resumes filling it.

    Args:
        folder: created if it doesn't exist; a finished cache of the same reference and tokens is opened as it is.
        model: the reference; where autocast is on, it computes in that precision.
        dataset: from `tokenize_preferences`.
        pad_token_id: pads the batches that the reference reads.
        dtype: bfloat16, float16, float32 or float8; what storing costs the KL is in docs/performance.md.
        batch: rows at a time.

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
        "done": 0,
        "checksums": digest(),
    }
    existing = _read_header(folder)
    if existing is not None:
        _check_source(folder, existing, source)
        header = existing
    offsets = _response_offsets(dataset)
    if existing is None or existing["done"] < existing["rows"]:
        writer = _CacheWriter(folder, header, dataset, offsets, PreferenceCollator(pad_token_id))
        if existing is None:
            writer.allocate()
        writer.fill(reference, batch)
    return ReferenceCache(folder, header, offsets)


class _CacheWriter:
    """Writes a cache; `header` counts the rows that are done."""

    def __init__(
        self, folder: Path, header: Header, dataset: Dataset, offsets: np.ndarray, collate: PreferenceCollator
    ):
        self.folder, self.header, self.dataset = folder, header, dataset
        self.offsets, self.collate = offsets, collate

    def allocate(self) -> None:
        """Creates the files at their full sizes, the header last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        sizes = {
            self.folder / "checksums.bin": _CHECKSUM.itemsize * self.header["rows"],
            self.folder / "hidden.bin": _hidden_bytes(self.header, self.offsets),
        }
        for path in sizes:
            path.unlink(missing_ok=True)  # without a header it is what a killed process left
        self._check_space(sum(sizes.values()))
        for path, size in sizes.items():
            allocate(path, size)
        self._save_header()

    def _check_space(self, size: int) -> None:
        free, tokens = shutil.disk_usage(self.folder).free, int(self.offsets[-1])
        token_bytes = _storage(self.header).bytes_per_token(self.header["width"])
        print(
            f"The reference cache {self.folder} takes {size / 1e9:,.2f} GB ({tokens:,} response tokens of "
            f"{token_bytes:,} bytes); {free / 1e9:,.2f} GB are free.",
            file=sys.stderr,
            flush=True,
        )
        if size > free:
            raise OSError(errno.ENOSPC, f"the cache needs {size:,} bytes, but {free:,} are free", str(self.folder))

    @torch.no_grad()
    def fill(self, reference: CausalLM, batch: int) -> None:
        """Runs the reference over the rows that are not done, `batch` at a time."""
        _check_size(self.folder / "hidden.bin", _hidden_bytes(self.header, self.offsets))
        hidden = _map_hidden(self.folder, self.header, self.offsets, "r+")
        done_checksums = hashlib.blake2b(_read_checksums(self.folder, self.header).tobytes(), digest_size=16)
        checksums = np.memmap(self.folder / "checksums.bin", dtype=_CHECKSUM, mode="r+")
        total, saved = self.header["rows"], self.header["done"]
        was_training = reference.model.training
        reference.model.eval()
        with tqdm(total=total, initial=saved, desc="Caching the reference") as progress:
            for first in range(saved, total, batch):
                rows = range(first, min(total, first + batch))
                for row, states in zip(rows, self._states(reference, rows)):
                    stored = hidden[self.offsets[2 * row] : self.offsets[2 * row + 2]]
                    stored[:] = states
                    checksums[row] = zlib.crc32(stored.tobytes())
                progress.update(len(rows))
                if rows.stop == total or rows.stop // _ROWS_PER_SAVE != rows.start // _ROWS_PER_SAVE:
                    hidden.flush()
                    checksums.flush()
                    done_checksums.update(checksums[self.header["done"] : rows.stop].tobytes())
                    self.header["done"], self.header["checksums"] = rows.stop, done_checksums.hexdigest()
                    self._save_header()
        reference.model.train(was_training)

    def _states(self, reference: CausalLM, rows: range) -> list[np.ndarray]:
        """The packed hidden states of each row's responses, chosen before rejected."""
        batch = self.collate([self.dataset[row] for row in rows])
        device, storage = reference.weight.device, _storage(self.header)
        tensors = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
        hidden = reference.hidden(**tensors)
        states = storage.pack(hidden.flatten(0, 1)[batch["rows"].to(device)])
        sequences = np.split(states, np.cumsum(batch["row_lengths"])[:-1])  # chosen of all rows, then rejected
        return [np.concatenate(pair) for pair in zip(sequences[: len(rows)], sequences[len(rows) :])]

    def _save_header(self) -> None:
        write_sealed(self.folder / "header.json", dict(self.header))


def _storage(header: Header) -> StoredStates:
    return STORED_STATES[header["dtype"]]


def _hidden_bytes(header: Header, offsets: np.ndarray) -> int:
    return int(offsets[-1]) * _storage(header).bytes_per_token(header["width"])


def _check_size(path: Path, size: int) -> None:
    """Before a file is mapped: to read a mapping beyond the file's end would kill the process."""
    if not path.is_file():
        raise ValueError(_with_advice(path.parent, f"is corrupt: {path.name} is missing"))
    if path.stat().st_size != size:
        raise ValueError(
            _with_advice(path.parent, f"is corrupt: {path.name} has {path.stat().st_size:,} bytes, not {size:,}")
        )


def _map_hidden(folder: Path, header: Header, offsets: np.ndarray, mode: Literal["r", "r+"]) -> np.memmap:
    shape = (int(offsets[-1]), _storage(header).bytes_per_token(header["width"]))
    return np.memmap(folder / "hidden.bin", dtype=np.uint8, mode=mode, shape=shape)


def _read_checksums(folder: Path, header: Header) -> np.ndarray:  # uint32 (rows done)
    path = folder / "checksums.bin"
    _check_size(path, _CHECKSUM.itemsize * header["rows"])
    checksums = np.fromfile(path, dtype=_CHECKSUM, count=header["done"])
    if digest(checksums) != header["checksums"]:
        raise ValueError(_with_advice(folder, f"is corrupt: {path.name} does not match the header"))
    return checksums


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
