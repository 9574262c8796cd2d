"""Files that appear complete or not at all: written beside their destination, then renamed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Writes JSON atomically, replacing what was at `path`."""
    partial = path.with_suffix(".part")
    with open(partial, "w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def save_model(path: Path, model: Any, tokenizer: Any) -> None:
    """Saves a model and its tokenizer atomically in the new folder `path`."""
    partial = path.with_name(f"{path.name}.part")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(path)
