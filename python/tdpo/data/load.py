"""Preference rows from files, folders and hubs."""

from __future__ import annotations

import csv
import glob
import gzip
import json
import re
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    ReadInstruction,
    Value,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)

from .formats import format_of

_SPLITS = {  # by the words in the names of files and folders, as `datasets` has them
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
}


def load_preferences(name: str, split: str = "train") -> Dataset:
    """Rows from files, from a folder, or from a hub.

    Args:
        name: JSON, JSONL, Parquet, CSV or TSV, also gzipped, or a pattern of such files (`data/*.jsonl`); a folder of
            such files, whose names say which split they are (`train.jsonl`, `test/0.parquet`), or one that
            `save_to_disk` wrote; or a hub's name. Cells of CSV and TSV are texts as they stand.
        split: which rows, with slices, as `datasets` writes them: `train[:100]`, `train[10%:]+test`. Files and folders
            without splits are `train` and `test`, whichever is asked for.

    Raises:
        ValueError: there is no such file or split, it can't be read, or there is no such dataset on the hub.
    """
    path = Path(name)
    splits = _files_of_splits(path) if path.is_dir() else _without_splits(list(map(Path, sorted(glob.glob(name)))))
    files = [file for files in splits.values() for file in files]
    if not files and not path.is_dir() and format_of(path) is not None:
        raise ValueError(f"the dataset file {name} does not exist")
    try:
        if files:
            return _slice({split: _read_files(files) for split, files in splits.items()}, split)
        if not path.is_dir():
            return load_dataset(name, split=split)
        saved = load_from_disk(name)
        return _slice(saved if isinstance(saved, DatasetDict) else _without_splits(saved), split)
    except Exception as error:  # every format raises its own errors; `datasets` gives the reason in the cause
        reason = next(filter(None, map(_malformed_json, files)), "") or " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"the dataset {name!r} (split {split!r}) could not be loaded: {reason}") from error


def _files_of_splits(folder: Path) -> dict[str, list[Path]]:
    """The files of preferences in a folder by split; none in a folder of `save_to_disk`, which is read as a whole.

    Raises:
        ValueError: some files belong to a split by their names and others do not.
    """
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        return {}
    inside = (file.relative_to(folder) for file in sorted(folder.rglob("*")) if format_of(file) is not None)
    files = [file for file in inside if not any(part.startswith((".", "_")) for part in file.parts)]
    words = {file: set(re.split("[^a-z]+", str(file).lower())) for file in files}
    splits = {split: [file for file in files if words[file] & names] for split, names in _SPLITS.items()}
    named = {split: [folder / file for file in of_split] for split, of_split in splits.items() if of_split}
    strays = set(files).difference(*splits.values())
    if named and strays:
        raise ValueError(f"{folder} holds {min(strays)}, which its name gives to no split, unlike other files there")
    return named or _without_splits([folder / file for file in files])


def _read_files(files: list[Path]) -> Dataset:
    kinds = {format_of(file) for file in files}
    if len(kinds) > 1:
        raise ValueError(f"the files have different formats: {', '.join(map(str, files))}")
    options: dict[str, Any] = {}
    if kinds == {"csv"}:
        options = {"sep": "\t" if ".tsv" in files[0].name else ",", "keep_default_na": False}
        options["features"] = Features({column: Value("string") for column in _header(files[0], options["sep"])})
    return load_dataset(str(*kinds), data_files=list(map(str, files)), split="train", **options)


def _header(path: Path, separator: str) -> list[str]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path, newline="") as file:
        return next(csv.reader(file, delimiter=separator), [])


def _without_splits(rows: Any) -> dict[str, Any]:
    return {"train": rows, "test": rows}


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


def _malformed_json(path: Path) -> str:
    """Where a JSON file is malformed; "" if it isn't, or is another file."""
    if not path.is_file() or path.suffix == ".gz" or format_of(path) != "json":
        return ""
    content = path.read_bytes()
    if not content.strip():
        return "the file is empty"
    lines = [content] if content.lstrip().startswith(b"[") else content.split(b"\n")
    for number, line in enumerate(lines):
        try:
            json.loads(line or b"null")
        except json.JSONDecodeError as error:
            return f"line {number + error.lineno}, column {error.colno}: {error.msg}"
        except UnicodeDecodeError as error:
            return f"line {number + 1}: {error}"
    return ""
