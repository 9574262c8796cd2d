"""Bars on stderr, of work that may take long: the main process shows them, unless `disable_tqdm` is set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import TrainingArguments
from transformers.utils import logging


def shows_bars(args: TrainingArguments) -> bool:
    """Whether this process shows bars."""
    return not args.disable_tqdm and args.process_index == 0


def progress_bar(
    description: str, total: int | None, unit: str, *, done: int = 0, shown: bool = True, stays: bool = True
) -> Any:
    """transformers' bar, which its own switch disables too; a context manager with `update` and `close`.

    Args:
        total: of what is counted, or None where nobody knows.
        unit: of what is counted, in the plural; the rate is in it.
        done: how many were done before.
        shown: by this process.
        stays: it is left on the screen at its end.
    """
    return logging.tqdm(
        desc=description,
        total=total,
        initial=done,
        unit=f" {unit}",
        disable=not shown,
        leave=stays,
        dynamic_ncols=True,
    )


@contextmanager
def library_bars(*, shown: bool) -> Iterator[None]:
    """Lets `datasets` and transformers show bars of their own, or not: their switches, of a process, are put back."""
    with ExitStack() as put_back:
        if not shown and not are_progress_bars_disabled():
            disable_progress_bars()
            put_back.callback(enable_progress_bars)
        if not shown and logging.is_progress_bar_enabled():
            logging.disable_progress_bar()
            put_back.callback(logging.enable_progress_bar)
        yield
