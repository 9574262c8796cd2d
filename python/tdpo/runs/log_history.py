"""The entries of a trainer's log: those of training, and those of every evaluation set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]  # "step", and metrics by name
_OF_A_LOG = "rewards/accuracies"  # which evaluations have beside their loss, and nothing else that is logged


def of_training(history: Sequence[Entry]) -> list[Entry]:
    """The means between two logs of training; not the summary at its end, nor what a user logs by hand."""
    return [entry for entry in history if "loss" in entry]


def of_evaluations(history: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The evaluations of every set, by the prefix of its metrics: "eval_", or "eval_NAME_" where there are several."""
    sets: dict[str, list[Entry]] = {}
    for entry in history:
        prefix = evaluation_prefix(entry)
        if prefix:
            sets.setdefault(prefix, []).append(entry)
    return sets


def evaluation_prefix(entry: Entry) -> str:
    """The prefix of an evaluation's metrics; "" of other entries."""
    return next((name[: -len(_OF_A_LOG)] for name in entry if name.endswith(f"_{_OF_A_LOG}")), "")
