"""Ctrl-C and SIGTERM end a training after the current step, with a checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C ended the training, after its checkpoint was written."""


class Terminated(SystemExit):
    """A SIGTERM ended the training, after its checkpoint was written; the exit status is the shell's for it."""

    def __init__(self) -> None:
        super().__init__(128 + signal.SIGTERM)


class StopAfterStep(TrainerCallback):
    """Turns a signal into a checkpoint and the end of the training loop, on all processes if one receives it.

    Args:
        accelerator: of the processes.
        saves: whether a checkpoint is written.
    """

    def __init__(self, accelerator: Accelerator, *, saves: bool) -> None:
        self._accelerator, self._saves = accelerator, saves
        self.received = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals in this context; a received one is raised at its end.

        Raises:
            Interrupted, Terminated: a signal ended the training.
        """
        self.received = 0
        if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
            yield
            return
        before = {kind: signal.getsignal(kind) for kind in _SIGNALS}
        for kind, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(kind, self._receive)
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)
        if self.received == signal.SIGINT:
            raise Interrupted
        if self.received == signal.SIGTERM:
            raise Terminated

    def _receive(self, kind: int, frame: Any) -> None:
        self.received = kind
        signal.signal(kind, signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL)
        saves = " with a checkpoint" if self._saves else ""
        print(f"\nStopping after this step{saves}; once more stops at once.", file=sys.stderr, flush=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        accelerator = self._accelerator
        if accelerator.num_processes > 1:  # the processes must leave the loop at the same step
            received = torch.tensor([self.received], device=accelerator.device)
            self.received = int(accelerator.gather(received).max())
        if self.received:
            control.should_training_stop = True
            control.should_save = control.should_save or self._saves
