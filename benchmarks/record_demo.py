"""Keeps the results of a demo: benchmarks/results/demo.json and demo.png, of which the README shows a part.

python benchmarks/record_demo.py [out/demo]
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from common import RESULTS, save


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "out/demo")
    results, settings = (json.loads((out / f"{name}.json").read_text()) for name in ("results", "settings"))
    shutil.copyfile(out / "frontier.png", RESULTS / "demo.png")
    print(f"saved {save('demo', {'settings': settings, **results})}")


if __name__ == "__main__":
    main()
