"""Checkpoints that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint, rotate_checkpoints

STAGING = ".checkpoint-being-written"


def last_good(output_dir: str) -> str | None:
    """The newest whole checkpoint."""
    return get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None


@contextlib.contextmanager
def whole(trainer: Trainer) -> Iterator[str]:
    """A folder to write a checkpoint in; afterwards it is moved to the output folder, and old ones are removed.

    Raises:
        RuntimeError: it could not be written (a full disk, say); what was written is removed, and the last good
            checkpoint, which the message names, is as it was.
    """
    args, accelerator = trainer.args, trainer.accelerator
    home, staging = Path(args.output_dir), Path(args.output_dir, STAGING)
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while writing
    accelerator.wait_for_everyone()
    try:
        yield str(staging)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint of step {trainer.state.global_step} could not be written: {error}; last good checkpoint: "
            f"{last_good(args.output_dir) or 'none'}"
        ) from error
    accelerator.wait_for_everyone()
    best = trainer.state.best_model_checkpoint
    if best is not None and Path(best).parent == staging:
        trainer.state.best_model_checkpoint = str(home / Path(best).name)
        if args.should_save:
            trainer.state.save_to_json(str(Path(best, "trainer_state.json")))
    if args.should_save:
        for written in staging.iterdir():
            place = home / written.name
            if place.exists():  # a step saved twice: the older copy goes
                shutil.rmtree(place)
            written.rename(place)
        staging.rmdir()
        rotate_checkpoints(
            output_dir=args.output_dir,
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    accelerator.wait_for_everyone()
