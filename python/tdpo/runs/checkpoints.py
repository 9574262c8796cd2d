"""Atomic checkpoints: written in a staging folder, sealed with a manifest of their files, then renamed."""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from ..files import file_digest, read_sealed, write_sealed
from ..models.sharding import local_values

logger = logging.getLogger(__name__)
STAGING = "_checkpoint-being-written"  # a name that uploads to a hub leave out
MANIFEST = "manifest.json"  # sizes and digests of all other files of a checkpoint, written last


def checkpoints_of(output_dir: str | Path) -> list[Path]:
    """The checkpoints in `output_dir`, damaged ones included, newest first."""
    steps = {path: re.fullmatch(r"checkpoint-(\d+)", path.name) for path in Path(output_dir).glob("checkpoint-*")}
    found = {path: int(match[1]) for path, match in steps.items() if match and path.is_dir()}
    return sorted(found, key=lambda path: found[path], reverse=True)


def check(checkpoint: str | Path) -> None:
    """Compares a checkpoint with its manifest.

    Raises:
        ValueError: a file is missing, damaged or not listed; the message names it.
    """
    folder = Path(checkpoint)
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder / MANIFEST} is missing: the checkpoint is not complete, or not of this trainer")
    manifest = read_sealed(folder / MANIFEST)
    listed = manifest["files"]
    for name, (size, digest) in listed.items():
        path = folder / name
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size != size or file_digest(path) != digest:
            raise ValueError(f"{path} is damaged: it does not match {MANIFEST}")
    unknown = sorted(set(_files(folder)) - set(listed))
    if unknown:  # a loader might prefer it to a listed one
        raise ValueError(f"{folder / unknown[0]} does not belong to the checkpoint: it is not in {MANIFEST}")


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest good checkpoint in `output_dir`, or None."""
    return _newest_good(output_dir)[0]


def _newest_good(output_dir: str | Path) -> tuple[str | None, list[str]]:
    """The newest good checkpoint, or None, and what is wrong with the newer ones."""
    problems = []
    for checkpoint in checkpoints_of(output_dir):
        try:
            check(checkpoint)
        except (ValueError, OSError) as error:
            problems.append(str(error))
        else:
            return str(checkpoint), problems
    return None, problems


def checkpoint_to_resume(output_dir: str | Path, wanted: str | bool) -> str:
    """The checkpoint `wanted`, or with True the newest good one in `output_dir`, after a check of its files.

    Raises:
        ValueError: it is damaged or holds no optimizer; or there is none, or none that is good.
    """
    if isinstance(wanted, str):
        check(wanted)
    else:
        good, problems = _newest_good(output_dir)
        if good is None:
            raise ValueError(f"{output_dir} holds no good checkpoint to resume from: {'; '.join(problems) or 'none'}")
        for problem in problems:
            logger.warning("resuming from an older checkpoint, %s: %s", good, problem)
        wanted = good
    if read_sealed(Path(wanted, MANIFEST))["only_model"]:
        raise ValueError(f"{wanted} was written with save_only_model: it holds no optimizer state to resume from")
    return wanted


def check_finite(trainer: Trainer) -> None:
    """Checks the weights, on all processes if they are sharded.

    Raises:
        FloatingPointError: a weight is infinite or NaN; the message names the parameter.
    """
    bad = [_first_not_finite(trainer.model)]
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled or trainer.get_tp_size() > 1:
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
        accelerator.wait_for_everyone()
        _relocate_best(trainer, staging, output_dir)
        if args.should_save:
            for checkpoint in staging.iterdir():
                _write_manifest(checkpoint, only_model=args.save_only_model)
    except Exception as error:
        shutil.rmtree(staging, ignore_errors=True)
        raise RuntimeError(
            f"the checkpoint of step {trainer.state.global_step} could not be written: {error}; last good checkpoint: "
            f"{last_checkpoint(args.output_dir) or 'none'}"
        ) from error
    if args.should_save:
        _publish(staging, output_dir)
        rotate_checkpoints(
            output_dir=args.output_dir,
            save_total_limit=args.save_total_limit,
            best_model_checkpoint=trainer.state.best_model_checkpoint,
            use_mtime=True,
        )
    accelerator.wait_for_everyone()


def _files(checkpoint: Path) -> list[str]:
    """The files of a checkpoint but its manifest, relative to it."""
    paths = (path.relative_to(checkpoint) for path in checkpoint.rglob("*") if not path.is_dir())
    return sorted(path.as_posix() for path in paths if path.as_posix() != MANIFEST)


def _write_manifest(checkpoint: Path, only_model: bool) -> None:
    paths = {name: checkpoint / name for name in _files(checkpoint)}
    files = {name: (path.stat().st_size, file_digest(path)) for name, path in paths.items()}
    write_sealed(checkpoint / MANIFEST, {"only_model": only_model, "files": files})


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
