"""Preference rows from files, folders and hubs."""

from __future__ import annotations

import functools
import glob
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from .files import read_rows
from .formats import format_of

_SPLITS = {  # by the words in the names of files and folders, as `datasets` has them
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def load_preferences(name: str, split: str = "train", streaming: bool = False) -> Dataset | IterableDataset:
    """Rows from files, from a folder, or from a hub.

    Args:
        name: JSON, JSONL, Parquet, CSV or TSV, also gzipped, or a pattern of such files (`data/*.jsonl`); a folder of
            such files, whose names say which split they are (`train.jsonl`, `test/0.parquet`), or one that
            `save_to_disk` wrote; or a hub's name. Cells of CSV and TSV are texts as they stand.
        split: which rows, with slices, as `datasets` writes them: `train[:100]`, `train[10%:]+test`. Files and folders
            without splits are `train` and `test`, whichever is asked for.
        streaming: rows are read when they are asked for: an IterableDataset. Only those of a folder have slices.

    Raises:
        ValueError: there is no such file or split, it can't be read, or there is no such dataset on the hub.
    """
    path = Path(name)
    splits = _files_of_splits(path) if path.is_dir() else _without_splits(_files_named(name))
    files = [file for files in splits.values() for file in files]
    if not files and not path.is_dir() and (format_of(path) is not None or path.exists()):
        found = "is of no format that is read here" if path.exists() else "does not exist"
        raise ValueError(f"the dataset file {name} {found}")
    if streaming and "[" in split and not path.is_dir():
        raise ValueError(f"streaming is True and the split is {split!r}, but slices are not streamed: leave one out")
    try:
        if files:
            if streaming:
                return _read_files(_part(splits, split), streaming=True)
            read = functools.cache(_read_files)  # a file without splits is each of them, and read once
            return _slice({split: read(tuple(files)) for split, files in splits.items()}, split)
        if not path.is_dir():
            return load_dataset(name, split=split, streaming=streaming)
        saved = load_from_disk(name)
        rows = _slice(saved if isinstance(saved, DatasetDict) else _without_splits(saved), split)
        return rows.to_iterable_dataset() if streaming else rows
    except Exception as error:  # every format raises its own errors; `datasets` gives the reason in the cause
        reason = " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"the dataset {name!r} (split {split!r}) could not be loaded: {reason}") from error


def _files_named(name: str) -> list[Path]:
    """The file of that name, or those of a pattern."""
    if Path(name).is_file():
        return [Path(name)] if format_of(Path(name)) else []
    return [file for file in map(Path, sorted(glob.glob(name, recursive=True))) if file.is_file() and format_of(file)]


def _files_of_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of preferences in a folder by split; none in a folder of `save_to_disk`, which is read as a whole.

    Raises:
        ValueError: a file belongs to several splits by its name, or to none although others do.
    """
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return {}
    splits: dict[str | None, list[Path]] = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        hidden = any(part.startswith((".", "_")) for part in parts)
        if format_of(file) is not None and not hidden and file.name != "dataset_infos.json":
            splits.setdefault(_split_of(parts), []).append(file)
    strays = splits.pop(None, [])
    if splits and strays:
        raise ValueError(f"{folder} holds {strays[0]}, which its name gives to no split, unlike other files there")
    named = {split: splits[split] for split in _SPLITS if split in splits}
    return named or (_without_splits(strays) if len(strays) == 1 else {"train": strays} if strays else {})


def _split_of(parts: tuple[str, ...]) -> str | None:
    """The split that a file's own name says, or else that of the nearest folder whose name says one."""
    for part in reversed(parts):
        words = {word.lower() for word in re.findall("[A-Z]?[a-z]+|[A-Z]+", part)}
        words |= {word.removesuffix("set").removesuffix("data") for word in words}
        found = [split for split, names in _SPLITS.items() if words & names]
        if len(found) > 1:
            raise ValueError(f"{part} has the names of several splits: {', '.join(found)}")
        if found:
            return found[0]
    return None


def _read_files(files: Sequence[Path], *, streaming: bool = False) -> Any:
    formats = {format_of(file) for file in files}
    if len(formats) > 1:
        raise ValueError(f"the files have different formats: {', '.join(map(str, files))}")
    if formats != {"parquet"}:
        return read_rows(files, streaming=streaming)
    names = [glob.escape(str(file)) for file in files]  # `datasets` takes them for patterns
    return load_dataset("parquet", data_files=names, split="train", streaming=streaming)


def _without_splits(rows: Any) -> dict[str, Any]:
    return {"train": rows, "test": rows}


def _part(splits: dict[str, list[Path]], wanted: str) -> list[Path]:
    if wanted not in splits:
        raise ValueError(f"there is no split {wanted!r} of streamed files; it has {', '.join(splits)}")
    return splits[wanted]


def _slice(splits: dict[str, Dataset], wanted: str) -> Dataset:
    """Some rows of some splits.

    Raises:
        ValueError: a split does not exist, or `wanted` can't be read.
    """
    try:
        parts = ReadInstruction.from_spec(wanted).to_absolute({name: len(rows) for name, rows in splits.items()})
    except ValueError as error:
        raise ValueError(f"there is no split {wanted!r}; it has {', '.join(splits)} ({error})") from None
    chosen = [splits[part.splitname].select(range(part.from_, part.to)) for part in parts]
    return chosen[0] if len(chosen) == 1 else concatenate_datasets(chosen)
