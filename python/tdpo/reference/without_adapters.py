"""The policy without its adapters as the reference."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .reference import Reference


@dataclass(frozen=True)
class WithoutAdapters(Reference):
    """The policy's own model; `adapted`, the peft model around it, takes its adapters out while it runs."""

    adapted: Any = None

    def running(self) -> AbstractContextManager[Any]:
        return self.adapted.disable_adapter()
