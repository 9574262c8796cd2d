"""Keeps the results of a demo, parts of which the README shows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common import RESULTS, save


def record(out: Path) -> Path:
    """Copies what a demo wrote to `out` into demo.json, whose path is returned, and demo.png."""
    results, settings = (json.loads((out / f"{name}.json").read_text()) for name in ("results", "settings"))
    shutil.copyfile(out / "frontier.png", RESULTS / "demo.png")
    return save("demo", {"settings": settings, **results})
