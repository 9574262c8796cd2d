"""What the option `model` and its like name: a path, or a hub's model.

Free of torch and transformers.
"""

from __future__ import annotations

import os
from pathlib import Path


def looks_like_path(name: str | os.PathLike[str]) -> bool:
    """Whether a name is a path rather than a hub's NAME or OWNER/NAME, of which it has no other form.

    A path begins with `/`, `.` or `~`, ends with `/`, holds more than one `/`, or is FOLDER/NAME with a folder that
    exists. No hub is asked for it.
    """
    name = os.fspath(name)
    owner, slash, _ = name.partition("/")
    return (
        name.startswith(("/", ".", "~"))
        or name.endswith("/")
        or name.count("/") > 1
        or (slash != "" and Path(owner).is_dir())
    )


def check_exists(what: str, name: str) -> None:
    """Raises ValueError where a name is a path, and nothing is there; `what` it would be is said first."""
    if looks_like_path(name) and not Path(name).exists():
        raise ValueError(f"the {what} {name} does not exist")


def check_gguf_exists(folder: str | os.PathLike[str], option: str, gguf_file: str) -> None:
    """Raises ValueError where a model is a folder that lacks a GGUF file, which `option` names."""
    if Path(folder).is_dir() and not Path(folder, gguf_file).is_file():
        others = ", ".join(sorted(path.name for path in Path(folder).glob("*.gguf"))) or "none"
        raise ValueError(f"{option} is {gguf_file}, which is not in {folder}; GGUF files there: {others}")


def is_here(name: str) -> bool:
    """Whether a name is of this disk; where not, it is a hub's."""
    return Path(name).exists() or looks_like_path(name)
