"""The reference's hidden states on disk: computed once, then only its head is needed.

A cache is a folder of plain arrays with a JSON header; nothing in it is ever unpickled:

    header.json    fingerprints of what it was made from, sizes, and how many rows are done
    offsets.npy    int64 (2 rows + 1): where each response begins, chosen before rejected of every row
    hidden.bin     the last hidden states that predict the response tokens, (tokens, D), float32 or 16-bit
    checksums.npy  uint32 (rows): CRC-32 of a row's bytes, checked whenever the row is read

It is written row by row and goes on where it was interrupted. One that was made from other weights, other tokens or
with another precision, or that was torn, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from .data import PreferenceCollator
from .head import LanguageModelHead, unwrapped

FORMAT = 1
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_SAVE_EVERY = 64  # rows between two updates of the header


def _fingerprints(model: nn.Module, dataset: Dataset) -> dict[str, str]:
    weights = hashlib.blake2b(digest_size=16)
    for name, value in unwrapped(model).state_dict().items():
        weights.update(name.encode())
        weights.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    tokens = hashlib.blake2b(digest_size=16)
    for row in dataset:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            tokens.update(np.asarray([len(row[name]), *row[name]], dtype=np.int64).data)
    return {"reference weights": weights.hexdigest(), "tokenized data": tokens.hexdigest()}


class ReferenceCache:
    """Reads a finished cache.

    Raises:
        ValueError: it isn't there, isn't finished, is torn, or was made from something else; the message says what, and
            what makes it anew.
    """

    def __init__(self, folder: str | Path, header: dict):
        self.folder, self.header = Path(folder), header
        self._dtype = DTYPES[header["dtype"]]
        self._offsets = np.load(self.folder / "offsets.npy", allow_pickle=False)
        self._checksums = np.load(self.folder / "checksums.npy", allow_pickle=False)
        shape = (int(self._offsets[-1]), header["width"])
        storage = np.float32 if self._dtype == torch.float32 else np.uint16
        size = (self.folder / "hidden.bin").stat().st_size
        if size != shape[0] * shape[1] * np.dtype(storage).itemsize or len(self._checksums) != header["rows"]:
            raise ValueError(_advice(folder, "is torn: its arrays don't have the sizes that its header tells"))
        self._hidden = np.memmap(self.folder / "hidden.bin", dtype=storage, mode="r", shape=shape)

    @classmethod
    def open(cls, folder: str | Path, model: nn.Module, dataset: Dataset, dtype: str) -> ReferenceCache:
        """The cache in `folder`, once it is known to be of this reference and of these tokens."""
        header = _read_header(folder)
        if header is None:
            raise ValueError(_advice(folder, "does not exist"))
        wanted = {"format": FORMAT, "dtype": dtype, **_fingerprints(model, dataset)}
        differs = [name for name, value in wanted.items() if header.get(name) != value]
        if differs:
            raise ValueError(_advice(folder, f"was made with another {' and another '.join(differs)}"))
        if header["done"] != header["rows"]:
            raise ValueError(_advice(folder, f"is not finished: {header['done']} of {header['rows']} rows"))
        return cls(folder, header)

    def hidden(self, row: int, side: str) -> Tensor:
        """The states of one response, (tokens, D), once the row's checksum is found right."""
        begin, middle, end = (int(offset) for offset in self._offsets[2 * row : 2 * row + 3])
        if zlib.crc32(self._hidden[begin:end].tobytes()) != self._checksums[row]:
            raise ValueError(_advice(self.folder, f"is torn: row {row} does not have its checksum"))
        part = self._hidden[begin:middle] if side == "chosen" else self._hidden[middle:end]
        values = torch.from_numpy(part.copy())
        return values if self._dtype == torch.float32 else values.view(self._dtype)


def cache_reference(
    folder: str | Path, model: nn.Module, dataset: Dataset, pad_token_id: int, dtype: str = "bfloat16", batch: int = 8
) -> ReferenceCache:
    """Fills the cache in `folder` with the reference's hidden states of a tokenized dataset, or goes on filling it.

    Args:
        folder: made if it isn't there; a finished cache of the same reference and tokens is opened as it is.
        model: the reference.
        dataset: from `tokenize_preferences`.
        dtype: bfloat16, float16 or float32; what storing costs the KL is in docs/performance.md.
        batch: rows at a time.

    Raises:
        ValueError: the folder holds a cache of something else, or `dtype` is unknown.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
    folder = Path(folder)
    head = LanguageModelHead.of(model)
    if head.obstacle is not None:
        raise ValueError(f"the reference's hidden states can't be cached: {head.obstacle}")
    offsets = _offsets(dataset)
    header = {
        "format": FORMAT,
        "dtype": dtype,
        **_fingerprints(model, dataset),
        "rows": len(dataset),
        "width": head.weight.shape[1],
        "done": 0,
    }
    found = _read_header(folder)
    if found is not None:
        if {**found, "done": 0} != header:
            raise ValueError(_advice(folder, "holds the cache of another reference, other data or another precision"))
        header["done"] = found["done"]
    else:
        _allocate(folder, header, offsets)
    if header["done"] < header["rows"]:
        _fill(folder, header, head, dataset, offsets, pad_token_id, batch)
    return ReferenceCache(folder, header)


def _offsets(dataset: Dataset) -> np.ndarray:
    lengths = [
        len(row[f"{side}_ids"]) - (0 if row["prompt_ids"] else 1) for row in dataset for side in ("chosen", "rejected")
    ]
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def _allocate(folder: Path, header: dict, offsets: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "offsets.npy", offsets)
    np.save(folder / "checksums.npy", np.zeros(header["rows"], dtype=np.uint32))
    with open(folder / "hidden.bin", "wb") as file:
        file.truncate(int(offsets[-1]) * header["width"] * DTYPES[header["dtype"]].itemsize)
    _write_header(folder, header)


@torch.no_grad()
def _fill(folder: Path, header: dict, head: LanguageModelHead, dataset, offsets, pad_token_id: int, batch: int) -> None:
    dtype, device = DTYPES[header["dtype"]], head.weight.device
    storage = np.float32 if dtype == torch.float32 else np.uint16
    hidden = np.memmap(folder / "hidden.bin", storage, "r+", shape=(int(offsets[-1]), header["width"]))
    checksums = np.load(folder / "checksums.npy", mmap_mode="r+", allow_pickle=False)
    collate, was_training = PreferenceCollator(pad_token_id), head.model.training
    head.model.eval()
    done = header["done"]
    with tqdm(total=header["rows"], initial=done, desc="Caching the reference") as progress:
        while done < header["rows"]:
            rows = range(done, min(header["rows"], done + batch))
            made = collate([dataset[row] for row in rows])
            states = head.hidden(**{name: value.to(device) for name, value in made.items()})
            states = states.flatten(0, 1)[made["rows"].to(device)].to(dtype).cpu()
            stored = (states if dtype == torch.float32 else states.view(torch.uint16)).numpy()
            sides = np.split(stored, made["cu_seqlens"][1:-1].numpy())  # chosen of all rows, then rejected
            for index, row in enumerate(rows):
                part = hidden[offsets[2 * row] : offsets[2 * row + 2]]
                part[:] = np.concatenate([sides[index], sides[len(rows) + index]])
                checksums[row] = zlib.crc32(part.tobytes())
            done = rows[-1] + 1
            progress.update(len(rows))
            if done == header["rows"] or done // _SAVE_EVERY != rows[0] // _SAVE_EVERY:
                hidden.flush()
                checksums.flush()
                header["done"] = done
                _write_header(folder, header)
    head.model.train(was_training)


def _read_header(folder: str | Path) -> dict | None:
    path = Path(folder, "header.json")
    return json.loads(path.read_text()) if path.exists() else None


def _write_header(folder: Path, header: dict) -> None:
    part = folder / "header.part"
    with open(part, "w") as file:
        json.dump(header, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(folder / "header.json")


def _advice(folder: str | Path, what: str) -> str:
    return f"the reference cache {folder} {what}; remove it and run `tdpo cache-reference` with the same options anew"
