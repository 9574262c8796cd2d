"""The picture of a log for those of `report_to` that show pictures: TensorBoard and Weights & Biases.

A training has closed TensorBoard's writer when it is over, and left the run of Weights & Biases open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, WandbCallback

_NAME = "training"


def send_picture(path: Path, figure: Any, text: str, step: int, trackers: Sequence[TrainerCallback]) -> Iterator[str]:
    """Sends a picture, and what it shows in words; yields a sentence for every tracker that can't have it.

    Args:
        path, figure: the picture as a file, and matplotlib's.
        trackers: callbacks of a trainer that has trained; others than the two have nothing to do with it.
    """
    for tracker in trackers:
        if isinstance(tracker, TensorBoardCallback) and tracker.logging_dir is not None:
            try:
                with tracker._SummaryWriter(log_dir=tracker.logging_dir) as writer:
                    writer.add_figure(_NAME, figure, step)
                    writer.add_text(_NAME, text, step)
            except OSError as error:
                yield f"TensorBoard has no picture of the log: {error}"
        elif isinstance(tracker, WandbCallback) and tracker._initialized:
            wandb = tracker._wandb
            try:
                wandb.log({_NAME: wandb.Image(str(path), caption=text), "train/global_step": step})
            except (OSError, wandb.Error) as error:
                yield f"Weights & Biases has no picture of the log: {error}"
