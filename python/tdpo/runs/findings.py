"""What the log of a run says, in sentences: how it went, and what to look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from .log_history import Entry, of_evaluations, of_training

_PART = 10  # the mean of a tenth of the entries at either end: single ones vary with their batches
_CHANCE = 0.55  # an accuracy: a half, and the standard error of a hundred pairs
_AT_ONCE = 0.99  # an accuracy at the beginning, where the policy has hardly moved
_UNEVEN = 2  # KL of rejected over chosen responses: lengths differ, but hardly by as much
_SHARE = 0.25  # of the margin: a smaller fall of the chosen rewards is less than what the margin varies by
_WORSE = 1.05  # a loss over the lowest one: less is within what evaluation sets of hundreds of pairs vary by


class Ends(NamedTuple):
    """A metric at the beginning of a run and at its end; NaN, of which no rule holds, where it is not logged."""

    first: float
    last: float


class Course(NamedTuple):
    """How a run went.

    Attributes:
        evaluated: the lowest loss of an evaluation set, and the last; of several sets, that which rose most.
        kl_warning: the option.
    """

    accuracy: Ends
    margin: Ends
    chosen: Ends
    rejected: Ends
    kl_chosen: Ends
    kl_rejected: Ends
    evaluated: Ends
    kl_warning: float


class _Rule(NamedTuple):
    holds: Callable[[Course], bool]
    says: str


# Rewards are compared with zero, where the policy is its reference, only where there is one: the KL says so.
_RULES = (
    _Rule(
        lambda run: run.accuracy.last < _CHANCE,
        "the accuracy, {accuracy.last:.2f}, is still that of chance: a larger learning_rate or more steps",
    ),
    _Rule(
        lambda run: run.accuracy.first >= _AT_ONCE,
        "the accuracy is {accuracy.first:.2f} from the beginning: length or style alone may tell the pairs apart",
    ),
    _Rule(
        lambda run: 0 < run.kl_warning < run.kl_chosen.last,
        "the KL of chosen responses, {kl_chosen.last:.3g} nats, is above kl_warning, {kl_warning:g}: the policy is far "
        "from its reference; a lower learning_rate or a larger beta keeps it near",
    ),
    _Rule(
        lambda run: run.kl_rejected.last > max(1, _UNEVEN * run.kl_chosen.last),
        "the KL of rejected responses, {kl_rejected.last:.3g} nats, is far above that of chosen ones, "
        "{kl_chosen.last:.3g}: tdpo2 with a larger alpha holds it",
    ),
    _Rule(
        lambda run: run.kl_chosen.last >= 0 and -run.chosen.last > _SHARE * run.margin.last > 0,
        "the rewards of chosen responses fell with those of rejected ones, to {chosen.last:.3g} and "
        "{rejected.last:.3g}: both are less likely than under the reference; a lower learning_rate, a larger beta, or "
        "SFT on the chosen responses first",
    ),
    _Rule(
        lambda run: run.evaluated.last > _WORSE * run.evaluated.first > 0,
        "the loss of the evaluation rose from {evaluated.first:.3g}, its lowest, to {evaluated.last:.3g}: the last "
        "steps fit the training pairs alone; fewer of them, or load_best_model_at_end, keep the best",
    ),
)


def findings(log_history: Sequence[Entry], *, kl_warning: float) -> Iterator[str]:
    """How margin, accuracy and KL went, in one sentence, then one for everything that should be looked at.

    Args:
        log_history: of a trainer's state, with an entry of training.
        kl_warning: the option; 0 says nothing of a large KL.
    """
    training = of_training(log_history)
    run = _course(log_history, kl_warning)
    went = (
        f"steps {training[0]['step']} to {training[-1]['step']}: the margin went from {run.margin.first:.3g} to "
        f"{run.margin.last:.3g}, the accuracy from {run.accuracy.first:.2f} to {run.accuracy.last:.2f}"
    )
    if len(training) == 1:
        went = (
            f"step {training[0]['step']}, the only one that was logged: the margin is {run.margin.last:.3g}, the "
            f"accuracy {run.accuracy.last:.2f}"
        )
    kl = f"; the KL is {run.kl_chosen.last:.3g} nats of chosen responses, {run.kl_rejected.last:.3g} of rejected ones"
    yield went + ("" if math.isnan(run.kl_chosen.last) else kl)
    yield from (f"look at this: {rule.says.format(**run._asdict())}" for rule in _RULES if rule.holds(run))


def _course(log_history: Sequence[Entry], kl_warning: float) -> Course:
    training = of_training(log_history)
    losses = ([entry[f"{prefix}loss"] for entry in entries] for prefix, entries in of_evaluations(log_history).items())
    evaluated = (Ends(min(values), values[-1]) for values in losses)
    return Course(
        accuracy=_ends(training, "rewards/accuracies"),
        margin=_ends(training, "rewards/margins"),
        chosen=_ends(training, "rewards/chosen"),
        rejected=_ends(training, "rewards/rejected"),
        kl_chosen=_ends(training, "kl/chosen"),
        kl_rejected=_ends(training, "kl/rejected"),
        evaluated=max(evaluated, key=lambda ends: ends.last - ends.first, default=Ends(math.nan, math.nan)),
        kl_warning=kl_warning,
    )


def _ends(entries: list[Entry], name: str) -> Ends:
    values = [entry[name] for entry in entries if name in entry]
    if not values:
        return Ends(math.nan, math.nan)
    part = max(1, len(values) // _PART)
    return Ends(sum(values[:part]) / part, sum(values[-part:]) / part)
