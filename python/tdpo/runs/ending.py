"""What a run ends with, beside its model: a picture of its log, and what to look at."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback, TrainerState

from ..config import TDPOConfig
from ..files import write_bytes
from .curves import plot_log
from .findings import findings
from .log_history import of_training
from .trackers import send_picture

PICTURE = "training.png"  # in output_dir
_MORE = 'more: docs/troubleshooting.md, "Training does not move, or moves too far"'


def show_log(state: TrainerState, args: TDPOConfig, trackers: Sequence[TrainerCallback]) -> bool:
    """Draws a run's log beside its model and for its trackers, and says on stderr how it went.

    For when the model is saved: what is wrong with the picture is said in a line, and no error.

    Args:
        state: of the trainer.
        trackers: its callbacks, of which some track.

    Returns:
        Whether there is a picture in output_dir.
    """
    path = Path(args.output_dir, PICTURE)
    if not of_training(state.log_history):
        _say("nothing was logged, so that there is no picture of it: an entry is made every logging_steps")
        return False
    said = list(findings(state.log_history, kl_warning=args.kl_warning))
    _say(*said)
    if len(said) > 1:
        _say(_MORE)
    try:
        path.unlink(missing_ok=True)  # where none can be drawn, an older one would be of another log
        figure, drawn = plot_log(state.log_history), io.BytesIO()
        figure.savefig(drawn, format="png", dpi=150)
        write_bytes(path, drawn.getvalue())
    except (ImportError, OSError) as error:
        _say(f"there is no picture of the log: {error}")
        return False
    _say(f"the log as a picture: {path}")
    for problem in send_picture(path, figure, "\n".join(said), state.global_step, trackers):
        _say(problem)
    return True


def _say(*lines: str) -> None:
    print(*lines, sep="\n", file=sys.stderr)
