"""A kernel's error ends with its test, as if each test had a process of its own."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _own_errors() -> Iterator[None]:
    yield
    import torch

    if torch.cuda.is_initialized():
        from .queue import forget_errors

        gc.collect()
        forget_errors()
