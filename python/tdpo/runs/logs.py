"""Progress bars of training and evaluation, and one readable line for every log, on stderr."""

from __future__ import annotations

import logging
import sys
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer_utils import has_length

from ..progress import progress_bar
from .log_history import evaluation_prefix

logger = logging.getLogger(__name__)
_SHORT = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "kl/chosen": "KL chosen",
    "kl/rejected": "rejected",
    "aux_loss": "router",
    "grad_norm": "gradient",
    "learning_rate": "learning rate",
}


def readable(logs: dict[str, Any], step: int, max_steps: int) -> str:
    """The main metrics of a log entry in one line; the rest is in the log history and where `report_to` sends it."""
    if "train_loss" in logs:
        return f"trained {step} steps in {logs['train_runtime']:.1f} s, mean loss {logs['train_loss']:.4g}"
    prefix = evaluation_prefix(logs)
    what = f"{prefix.rstrip('_')} at step {step}" if prefix else f"step {step}/{max_steps}"
    shown = [f"{label} {logs[prefix + name]:.4g}" for name, label in _SHORT.items() if prefix + name in logs]
    return f"{what}: {', '.join(shown)}"


class Lines(PrinterCallback):
    """Readable lines without a bar, with `disable_tqdm`."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        if state.is_world_process_zero and logs:
            tqdm.write(readable(logs, state.global_step, state.max_steps), file=sys.stderr)


class Progress(Lines, ProgressCallback):
    """transformers' progress bars, with readable lines above them; that of an evaluation counts pairs, not batches."""

    prediction_bar: Any  # transformers assigns None first

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **others: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        sized = has_length(eval_dataloader)  # streams have none
        pairs, batches = (len(eval_dataloader.dataset), len(eval_dataloader)) if sized else (None, None)
        if self.prediction_bar is None:
            self._done, stays = 0, self.training_bar is None
            self.prediction_bar = progress_bar("Evaluating", pairs, "pairs" if sized else "batches", stays=stays)
        before, self._done = self._done, self._done + 1
        if pairs is None or batches is None:
            self.prediction_bar.update()
        else:  # batches of about as many pairs each
            self.prediction_bar.update(pairs * self._done // batches - pairs * before // batches)


class KLWarning:
    """Warns once when the mean KL of chosen responses is above a threshold; 0 never warns."""

    def __init__(self, threshold: float, learning_rate: float) -> None:
        self._threshold, self._learning_rate, self._given = threshold, learning_rate, False

    def check(self, kl: float, step: int) -> None:
        if self._given or not 0 < self._threshold < kl:
            return
        self._given = True
        logger.warning(
            "the mean KL of chosen responses is %.3g nats at step %d, above kl_warning, %g: the policy leaves its "
            "reference fast; a lower learning_rate (%g now) or a larger beta keeps it near",
            *(kl, step, self._threshold, self._learning_rate),
        )


def show_readable_logs(trainer: Trainer) -> None:
    """Replaces transformers' own progress bar and printed logs; other callbacks stay."""
    for theirs, ours in {ProgressCallback: Progress, PrinterCallback: Lines}.items():
        if any(type(callback) is theirs for callback in trainer.callback_handler.callbacks):
            trainer.remove_callback(theirs)
            trainer.add_callback(ours)
