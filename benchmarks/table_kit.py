"""What the tables of the documentation are made with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
Table = Callable[[], str]
TABLES: dict[str, Table] = {}


def table(function: Table) -> Table:
    """Registers a function as the table of its name."""
    TABLES[function.__name__] = function
    return function


def load(name: str) -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
