"""Checks that every relative link in the Markdown files, and between the pages of docs/api, leads to an existing file.

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
    """Relative link targets of a page that don't exist."""
    broken = []
    for target in (_MARKDOWN if page.suffix == ".md" else _HTML).findall(page.read_text()):
        path = unquote(target.split("#")[0])
        if path and "${" not in path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
            broken.append(target)
    return broken


def pages() -> list[Path]:
    """The project's Markdown files, and the API reference if it has been built."""
    patterns = ("*.md", "docs/*.md", "examples/*.md", ".github/*.md", "docs/api/**/*.html")
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
