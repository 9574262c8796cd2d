"""Differences between policies on the same prompts and random numbers, with bootstrap intervals over the prompts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .evaluation import Evaluation, Point, reach, reward_at

RESAMPLES = 2000
LEVEL = 0.95  # of the intervals
Curve = list[Point]  # of a method, over the steps
Statistic = Callable[[Curve, Curve], float]


@dataclass(frozen=True)
class Difference:
    """A figure of one policy minus that of another."""

    value: float
    low: float  # of the percentile interval
    high: float
    error: float  # the standard error, on the same prompts and random numbers
    unpaired_error: float  # what it would be if each policy had prompts and random numbers of its own
    prompts: int

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def reward_after(one: Curve, other: Curve) -> float:
    """The difference in reward after the last step."""
    return one[-1]["reward"] - other[-1]["reward"]


def kl_after(one: Curve, other: Curve) -> float:
    """The difference in sequence KL after the last step."""
    return one[-1]["kl"] - other[-1]["kl"]


def reward_at_equal_kl(one: Curve, other: Curve) -> float:
    """The difference in reward at the largest sequence KL that both curves reach."""
    kl = reach([one, other])
    return reward_at(one, kl) - reward_at(other, kl)


def compare(statistic: Statistic, one: list[Evaluation], other: list[Evaluation], seed: int = 0) -> Difference:
    """The statistic of two methods' curves, and how far it varies when the prompts are drawn again with replacement.

    Whole curves are resampled, prompt by prompt: the uncertainty of the KLs at which rewards are compared is part of
    the interval. That of the training (its pairs, its order) is not.
    """
    prompts, random = len(one[-1].rewards), np.random.default_rng(seed)
    counts = random.multinomial(prompts, np.full(prompts, 1 / prompts), size=2 * RESAMPLES)
    ones, others = _curves(one, counts), _curves(other, counts)
    paired = np.array([statistic(*curves) for curves in zip(ones[:RESAMPLES], others)])
    unpaired = np.array([statistic(*curves) for curves in zip(ones[:RESAMPLES], others[RESAMPLES:])])
    low, high = np.quantile(paired, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    value = statistic(*(_curves(evaluations, np.ones((1, prompts)))[0] for evaluations in (one, other)))
    return Difference(value, float(low), float(high), float(paired.std()), float(unpaired.std()), prompts)


def _curves(evaluations: list[Evaluation], counts: np.ndarray) -> list[Curve]:
    """A method's curve in every resample, of which `counts` (resamples, n) says how often it holds each prompt."""
    rewards = [counts @ np.array(evaluation.rewards) / counts.sum(1) for evaluation in evaluations]
    kls = []
    for evaluation in evaluations:
        measured = counts[:, : len(evaluation.kls)]  # only the first prompts have a KL
        kls.append(measured @ np.array(evaluation.kls) / np.maximum(measured.sum(1), 1))
    return [
        [{"reward": float(reward), "kl": float(kl)} for reward, kl in zip(*resample)]
        for resample in zip(np.stack(rewards, 1), np.stack(kls, 1))
    ]
