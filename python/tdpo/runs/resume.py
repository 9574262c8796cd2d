"""Where an interrupted run resumes, and whether a run is finished."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from transformers import TrainerState

from ..config import TDPOConfig
from ..files import check_manifest, read_json, read_manifest
from .checkpoints import checkpoints_of, newest_good
from .record import RunRecord

logger = logging.getLogger(__name__)


class ResumePoint(NamedTuple):
    """A good checkpoint, the trainer's state in it, and whether nothing is left to train."""

    path: str
    state: TrainerState
    finished: bool


def resume_point(args: TDPOConfig, record: RunRecord, wanted: str | bool, total_steps: int) -> ResumePoint:
    """The checkpoint `wanted` of this run, or with True its newest good one.

    The main process chooses and checks it for all: they agree, and it is read once.

    Raises:
        ValueError: a file of the checkpoint is damaged, there is no good checkpoint, or it is of a run with other
            options or data and `resume_anyway` is not set; the message names what is wrong.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = _checkpoint(args.output_dir, wanted)
            record.check(outcome[0], anyway=args.resume_anyway)
        except (ValueError, OSError) as error:
            outcome[1] = str(error)
    path, problem = broadcast_object_list(outcome)
    if problem is not None:
        raise ValueError(problem)
    state = TrainerState.load_from_json(str(Path(path, "trainer_state.json")))
    finished = state.global_step >= total_steps
    if args.should_save and not finished:
        print(f"Resuming from {path}, at step {state.global_step} of {total_steps}.", file=sys.stderr)
    return ResumePoint(path, state, finished)


def finished_steps(args: TDPOConfig, record: RunRecord, total_steps: int) -> int:
    """The steps of a finished run whose model is saved in output_dir; 0 if there is none, or it can go on.

    Raises:
        ValueError: it is another run, or one to which steps would have to be added without a checkpoint.
    """
    state, can_go_on = Path(args.output_dir, "trainer_state.json"), bool(checkpoints_of(args.output_dir))
    if not state.is_file() or (args.resume_anyway and not can_go_on):
        return 0
    saved = read_json(state)["global_step"]
    if saved < total_steps and can_go_on:
        return 0
    record.check(args.output_dir, anyway=args.resume_anyway)
    if saved < total_steps:
        raise ValueError(
            f"output_dir is {args.output_dir}, which holds a run of {saved} steps without checkpoints, so it can't be "
            f"continued to {total_steps}; give another output_dir"
        )
    return saved


def _checkpoint(output_dir: str | Path, wanted: str | bool) -> str:
    """The checkpoint `wanted`, or with True the newest good one in `output_dir`, after a check of its files.

    Raises:
        ValueError: it is damaged or holds no optimizer, or no checkpoint is good.
    """
    if isinstance(wanted, str):
        check_manifest(wanted)
    else:
        good, problems = newest_good(output_dir)
        if good is None:
            raise ValueError(f"{output_dir} holds no good checkpoint to resume from: {'; '.join(problems) or 'none'}")
        for problem in problems:
            logger.warning("resuming from an older checkpoint, %s: %s", good, problem)
        wanted = good
    if read_manifest(wanted)["only_model"]:
        raise ValueError(f"{wanted} was written with save_only_model: it holds no optimizer state to resume from")
    return wanted
