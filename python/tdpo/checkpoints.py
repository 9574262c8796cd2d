"""Atomic checkpoints: written in a staging folder, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

STAGING = ".checkpoint-being-written"


def last_checkpoint(output_dir: str) -> str | None:
    """The newest complete checkpoint in `output_dir`, or None."""
    return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None


@contextlib.contextmanager
def atomic_checkpoint(trainer: Trainer) -> Iterator[str]:
    """Yields a staging folder to write a checkpoint in, then moves it to the output folder and removes old checkpoints.

    Raises:
        RuntimeError: the checkpoint could not be written (a full disk, for example). What was written is removed; the
            last good checkpoint, which the message names, is untouched.
    """
    args, accelerator = trainer.args, trainer.accelerator
    output_dir, staging = Path(args.output_dir), Path(args.output_dir, STAGING)
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)  # left behind by a run that was killed while writing
    accelerator.wait_for_everyone()
    try:
        yield str(staging)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint of step {trainer.state.global_step} could not be written: {error}; last good checkpoint: "
            f"{last_checkpoint(args.output_dir) or 'none'}"
        ) from error
    accelerator.wait_for_everyone()
    _relocate_best(trainer, staging, output_dir)
    if args.should_save:
        _publish(staging, output_dir)
        rotate_checkpoints(
            output_dir=args.output_dir,
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    accelerator.wait_for_everyone()


def _relocate_best(trainer: Trainer, staging: Path, output_dir: Path) -> None:
    """Records where the best checkpoint will be, if it is the one in the staging folder."""
    best = trainer.state.best_model_checkpoint
    if best is None or Path(best).parent != staging:
        return
    trainer.state.best_model_checkpoint = str(output_dir / Path(best).name)
    if trainer.args.should_save:
        trainer.state.save_to_json(str(Path(best, "trainer_state.json")))


def _publish(staging: Path, output_dir: Path) -> None:
    for checkpoint in staging.iterdir():
        destination = output_dir / checkpoint.name
        if destination.exists():  # this step was saved before; the newer copy replaces it
            shutil.rmtree(destination)
        checkpoint.rename(destination)
    staging.rmdir()
