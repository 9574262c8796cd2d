"""The formats of files of preferences. Free of `datasets`, which reads them."""

from __future__ import annotations

from pathlib import Path

_FORMATS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}


def format_of(path: Path) -> str | None:
    """The format of a file by its name; None where it is no name of a file of ours."""
    return _FORMATS.get((path.with_suffix("") if path.suffix == ".gz" else path).suffix)
