"""The formats of files of preferences. Free of `datasets`, which reads them."""

from __future__ import annotations

from pathlib import Path

COMPRESSED = (".gz", ".bz2", ".xz")
_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


def format_of(path: Path) -> str | None:
    """The format of a file by its name: json, csv, tsv or parquet; None where it is no name of a file of ours."""
    name = Path(path.name.lower())
    return _FORMATS.get((name.with_suffix("") if name.suffix in COMPRESSED else name).suffix)
