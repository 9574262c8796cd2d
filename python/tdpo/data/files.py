"""Rows of JSON, JSONL, CSV and TSV files, with every value as it stands: no dates or numbers are made of texts."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from datasets import Dataset, Features, IterableDataset, Json, List, Value

from .code import CODE
from .formats import COMPRESSED, format_of

_OPEN: dict[str, Any] = dict(zip(COMPRESSED, (gzip.open, bz2.open, lzma.open)))


def read_rows(files: Sequence[Path], *, streaming: bool) -> Dataset | IterableDataset:
    """The rows of JSON, JSONL, CSV or TSV files, in order.

    Raises:
        ValueError: a file is malformed; the message says where.
    """
    # Files and code are part of what the cache of `datasets` goes by: names of files and functions would not do.
    stamps = [(file.stat().st_mtime_ns, file.stat().st_size, CODE) for file in files]
    arguments: dict[str, Any] = {"files": list(map(str, files)), "stamps": stamps}
    if streaming:
        return IterableDataset.from_generator(_rows_of, gen_kwargs=arguments)
    features = _features(_rows_of(**arguments))
    return Dataset.from_generator(_table_of, gen_kwargs={**arguments, "columns": tuple(features)}, features=features)


def _table_of(files: list[str], stamps: list[tuple[Any, ...]], columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    yield from ({**dict.fromkeys(columns), **row} for row in _rows_of(files, stamps))


def _rows_of(files: list[str], stamps: list[tuple[Any, ...]]) -> Iterator[dict[str, Any]]:
    for file in map(Path, files):
        with _OPEN.get(file.suffix.lower(), open)(file, "rt", encoding="utf-8-sig", newline="") as opened:
            try:
                yield from (_of_json if format_of(file) == "json" else _of_cells)(opened, file)
            except (ValueError, csv.Error, EOFError, OSError) as error:
                raise ValueError(f"{file.name}, {error}" if len(files) > 1 else str(error)) from error


def _of_json(opened: TextIO, file: Path) -> Iterator[dict[str, Any]]:
    """The entries of a list, or an object in every line."""
    begin = opened.read(1)
    while begin.isspace():
        begin = opened.read(1)
    if not begin:
        raise ValueError("the file is empty")
    opened.seek(0)
    if begin == "[":
        yield from (_checked(row, f"entry {place}") for place, row in enumerate(_parsed(opened.read(), 1)))
        return
    for number, line in enumerate(opened, 1):
        if line.strip():
            yield _checked(_parsed(line.rstrip(), number), f"line {number}")


def _parsed(text: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {line + error.lineno - 1}, column {error.colno}: {error.msg}") from error


def _checked(row: Any, place: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a {type(row).__name__}; a row must be a mapping of columns to values")
    return row


def _of_cells(opened: TextIO, file: Path) -> Iterator[dict[str, str]]:
    """The rows of a CSV or TSV file, whose first line has the names of its columns."""
    reader = csv.reader(opened, delimiter="\t" if format_of(file) == "tsv" else ",", strict=True)
    header: list[str] = []
    for cells in reader:
        if not cells:
            continue
        if not header:
            header = cells
            if len({*header}) < len(header):
                raise ValueError(f"line {reader.line_num}: two columns have the same name: {', '.join(header)}")
            continue
        if len(cells) != len(header):
            raise ValueError(
                f"line {reader.line_num}: {len(cells)} cells, but the header has {len(header)} ({', '.join(header)})"
            )
        yield dict(zip(header, cells))


def _features(rows: Iterable[dict[str, Any]]) -> Features:
    """Texts and token ids as such; whatever else a column holds as JSON, so that it comes back as it was."""
    kinds: dict[str, set[str]] = {}
    for row in rows:
        for name, value in row.items():
            kinds.setdefault(name, set()).update([] if value is None else [_kind(value)])
    types = {"text": Value("string"), "ids": List(Value("int64"))}
    return Features(
        {
            name: types[found.pop()] if len(found) == 1 and found <= types.keys() else Json()
            for name, found in kinds.items()
        }
    )


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    return "ids" if isinstance(value, list) and value and all(type(entry) is int for entry in value) else "other"
