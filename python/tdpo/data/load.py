"""Preference rows from files, folders and hubs."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def load_preferences(name: str, split: str = "train") -> Dataset:
    """Rows from a JSON, JSONL, Parquet or CSV file, from a folder that `save_to_disk` wrote, or from a hub.

    Raises:
        ValueError: there is no such file or split, it can't be read, or there is no such dataset on the hub.
    """
    path = Path(name)
    if path.suffix in _FILE_FORMATS and not path.is_file():
        raise ValueError(f"the dataset file {name} does not exist")
    try:
        if path.suffix in _FILE_FORMATS:
            return load_dataset(_FILE_FORMATS[path.suffix], data_files=str(path), split="train")
        if not path.is_dir():
            return load_dataset(name, split=split)
        saved = load_from_disk(name)
    except Exception as error:  # every format raises its own errors; `datasets` gives the reason in the cause
        reason = _malformed_json(path) or " ".join(str(error.__cause__ or error).split())
        raise ValueError(f"the dataset {name!r} (split {split!r}) could not be loaded: {reason}") from error
    if not isinstance(saved, DatasetDict):
        return saved
    if split not in saved:
        raise ValueError(f"the dataset {name!r} has no split {split!r}; it has {', '.join(saved)}")
    return saved[split]


def _malformed_json(path: Path) -> str:
    """Where a JSON file is malformed; "" if it isn't, or is another file."""
    if not path.is_file() or _FILE_FORMATS.get(path.suffix) != "json":
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
