"""Atomic checkpoints: written in a staging folder, sealed with a manifest of their files, then renamed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer_utils import rotate_checkpoints, sort_checkpoints

from ..config import TDPOConfig
from ..files import check_manifest, write_manifest
from ..models.sharding import local_values

STAGING = "_checkpoint-being-written"  # uploads to a hub skip names that begin so


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """The checkpoints in `output_dir`, damaged ones included, newest first."""
    return [Path(path) for path in reversed(sort_checkpoints(str(output_dir)))]


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest good checkpoint in `output_dir`, or None."""
    return newest_good(output_dir)[0]


def newest_good(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """The newest good checkpoint, or None, and what is wrong with the newer ones."""
    problems = []
    for checkpoint in checkpoints_of(output_dir):
        try:
            check_manifest(checkpoint)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            return str(checkpoint), problems
    return None, problems


def check_loss(loss: Tensor, rows: Tensor, step: int, output_dir: str | Path) -> None:
    """Checks the loss of a batch of these rows.

    Raises:
        FloatingPointError: it is infinite or NaN.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss.item()} at step {step}, on rows {rows.tolist()} of the dataset; training stops; last "
            f"good checkpoint: {last_checkpoint(output_dir) or 'none'}"
        )


def check_finite(model: nn.Module, *, sharded: bool) -> None:
    """Checks the weights, those of all processes if they are sharded.

    Raises:
        FloatingPointError: a weight is infinite or NaN; the message names the parameter.
    """
    bad = [_first_not_finite(model)]
    if sharded:
        bad = gather_object(bad)
    for name in filter(None, bad):
        raise FloatingPointError(f"the weights of {name} are not all finite")


def _first_not_finite(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        values = local_values(parameter)
        if values.is_floating_point() and not torch.isfinite(values).all():
            return name
    return None


@contextlib.contextmanager
def atomic_checkpoint(args: TDPOConfig, accelerator: Accelerator, state: TrainerState) -> Iterator[str]:
    """Yields a staging folder to write a checkpoint in, then moves it to the output folder and removes old checkpoints.

    Raises:
        RuntimeError: the checkpoint could not be written (a full disk, for example). What was written is removed; the
            last good checkpoint, which the message names, is untouched.
    """
    output_dir, staging = Path(args.output_dir), Path(args.output_dir, STAGING)
    if args.should_save:
        shutil.rmtree(staging, ignore_errors=True)  # left behind by a run that was killed while writing
    accelerator.wait_for_everyone()
    try:
        yield str(staging)
        accelerator.wait_for_everyone()
        _relocate_best(state, staging, output_dir, saves=args.should_save)
        if args.should_save:
            for checkpoint in staging.iterdir():
                write_manifest(checkpoint, only_model=args.save_only_model)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint of step {state.global_step} could not be written: {error}; last good checkpoint: "
            f"{last_checkpoint(args.output_dir) or 'none'}"
        ) from error
    if args.should_save:
        _publish(staging, output_dir)
        rotate_checkpoints(
            output_dir=args.output_dir,
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=state.best_model_checkpoint,
            use_mtime=True,
        )
    accelerator.wait_for_everyone()


def _relocate_best(state: TrainerState, staging: Path, output_dir: Path, *, saves: bool) -> None:
    """Records where the best checkpoint will be, if it is the one in the staging folder."""
    best = state.best_model_checkpoint
    if best is None or Path(best).parent != staging:
        return
    state.best_model_checkpoint = str(output_dir / Path(best).name)
    if saves:
        state.save_to_json(str(Path(best, "trainer_state.json")))


def _publish(staging: Path, output_dir: Path) -> None:
    for checkpoint in staging.iterdir():
        destination = output_dir / checkpoint.name
        if destination.exists():  # this step was saved before; the newer copy replaces it
            shutil.rmtree(destination)
        checkpoint.rename(destination)
    staging.rmdir()
