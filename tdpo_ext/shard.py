"""The slice of the vocabulary that one rank of a process group holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class VocabShard:
    """Rows start to stop of a vocabulary sharded over `group`. Not supported yet: every function refuses it."""

    start: int
    stop: int
    group: Any
