"""Shows the results in benchmarks/results to readers.

    python benchmarks/report [--check]            writes the tables of README.md and docs/
    python benchmarks/report pictures             draws the README's pictures, summary.png and models.png
    python benchmarks/report demo [out/demo]      keeps the results of a demo as demo.json and demo.png

With --check nothing is written, and a page that differs is an error: figures can't drift from the measurements.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

if not __package__:  # run as a folder, whose parent holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from report import (  # noqa: F401  (they register their tables)
    builds,
    experiments,
    library,
    memory,
    modelled,
    models,
    pages,
    reliability,
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page differs")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("pictures")
    commands.add_parser("demo").add_argument("out", type=Path, nargs="?", default=Path("out/demo"))
    arguments = parser.parse_args()
    if arguments.command == "pictures":
        from report import pictures

        pictures.draw()
    elif arguments.command == "demo":
        from report import demo

        print(f"saved {demo.record(arguments.out)}")
    else:
        stale = pages.stale_pages(rewrite=not arguments.check)
        if arguments.check and stale:
            print(f"figures differ from benchmarks/results: {', '.join(stale)}; run `python benchmarks/report`")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
