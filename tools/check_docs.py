"""Checks that every relative link in Markdown files and notebooks, and between the pages of docs/api, leads somewhere.

python tools/check_docs.py
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parent.parent
_MARKDOWN = re.compile(r"\]\(([^)\s]+)\)")
_HTML = re.compile(r"""(?:href|src)="([^"]+)\"""")


def broken_links(page: Path) -> list[str]:
    """Relative link targets of a page that don't exist: files, and headings of Markdown files."""
    broken = []
    for target in (_HTML if page.suffix == ".html" else _MARKDOWN).findall(page.read_text()):
        path, _, heading = unquote(target).partition("#")
        if "${" in path or re.match(r"[a-z]+:", path):
            continue
        file = page.parent / path if path else page
        missing_heading = heading and file.suffix == ".md" and file.is_file() and heading not in headings(file)
        if not file.exists() or missing_heading:
            broken.append(target)
    return broken


def headings(page: Path) -> set[str]:
    """The names by which links find the headings of a page, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def pages() -> list[Path]:
    """The project's Markdown files and notebooks, and the API reference if it has been built."""
    patterns = ("*.md", "docs/*.md", "examples/*.md", "examples/*.ipynb", ".github/*.md", "docs/api/**/*.html")
    return [page for pattern in patterns for page in ROOT.glob(pattern)]


def main() -> int:
    """Prints the broken links; returns the number of pages that have any."""
    checked = pages()
    broken = {page: links for page in checked if (links := broken_links(page))}
    for page, links in broken.items():
        print(f"{page.relative_to(ROOT)}: {', '.join(links)}")
    print(f"{len(checked)} pages, {len(broken)} with broken links")
    return len(broken)


if __name__ == "__main__":
    sys.exit(main())
