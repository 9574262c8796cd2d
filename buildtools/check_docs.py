"""Whether every relative link of the Markdown files, and every link between pages of docs/api, leads to a file.

python buildtools/check_docs.py
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
    """Targets in a page that are neither on the web nor there."""
    found = []
    for target in (_MARKDOWN if page.suffix == ".md" else _HTML).findall(page.read_text()):
        path = unquote(target.split("#")[0])
        if path and "${" not in path and not re.match(r"[a-z]+:", path) and not (page.parent / path).exists():
            found.append(target)
    return found


def pages() -> list[Path]:
    """The Markdown files of the project, and the API reference where it is built."""
    named = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md")]
    return [*named, *ROOT.glob("docs/api/**/*.html")]


def main() -> int:
    """Prints what is broken; returns how many pages have such links."""
    bad = {page: links for page in pages() if (links := broken_links(page))}
    for page, links in bad.items():
        print(f"{page.relative_to(ROOT)}: {', '.join(links)}")
    print(f"{len(pages())} pages, {len(bad)} with broken links")
    return len(bad)


if __name__ == "__main__":
    sys.exit(main())
