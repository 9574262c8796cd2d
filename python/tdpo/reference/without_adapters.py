"""The policy without its adapters as the reference."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from .reference import ModelReference


@dataclass(frozen=True)
class WithoutAdapters(ModelReference):
    """The policy's own model; `adapted`, the peft model around it, takes its adapters out while it runs."""

    adapted: Any = None

    def running(self) -> AbstractContextManager[Any]:
        return self.adapted.disable_adapter()
