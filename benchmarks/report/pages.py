"""Pages with generated tables, and what the tables are made with.

The text between `<!-- table: NAME -->` and `<!-- end -->` on a page is the output of the table function NAME.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("models", "performance", "paper", "reliability", "building"))]
Table = Callable[[], str]
TABLES: dict[str, Table] = {}


def table(function: Table) -> Table:
    """Registers a function as the table of its name."""
    TABLES[function.__name__] = function
    return function


def load(name: str) -> dict:
    """The results in NAME.json."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rendered(text: str) -> str:
    """A page's text with every table generated from the results."""

    def replace(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->\n.*?<!-- end -->", replace, text, flags=re.DOTALL)


def stale_pages(*, rewrite: bool) -> list[str]:
    """The pages that differ from the results, which are then rewritten if asked for."""
    stale = []
    for name in PAGES:
        path = ROOT / name
        text = path.read_text()
        if rendered(text) != text:
            stale.append(name)
            if rewrite:
                path.write_text(rendered(text))
    return stale
