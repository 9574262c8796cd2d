"""What a run shows, in sentences with intervals."""

from __future__ import annotations

from dataclasses import dataclass

from .comparison import Difference, compare, kl_after, reward_after, reward_at_equal_kl
from .evaluation import Evaluation, Point, reach
from .settings import METHODS

_FOUR_IN_FIVE = 1.96 + 0.84  # standard errors: a difference that large is shown by the interval in 80% of runs
_MOST_PROMPTS = 1_000_000


@dataclass(frozen=True)
class Comparison:
    """A method beside another."""

    method: str
    other: str
    reward: Difference  # after the last step
    kl: Difference  # after the last step
    matched_kl: float  # the largest sequence KL that both reach
    reward_at_equal_kl: Difference


def compare_methods(method: str, other: str, evaluations: dict[str, list[Evaluation]]) -> Comparison:
    one, two = evaluations[method], evaluations[other]
    return Comparison(
        method=method,
        other=other,
        reward=compare(reward_after, one, two),
        kl=compare(kl_after, one, two),
        matched_kl=reach([_points(one), _points(two)]),
        reward_at_equal_kl=compare(reward_at_equal_kl, one, two),
    )


def _points(evaluations: list[Evaluation]) -> list[Point]:
    return [evaluation.point() for evaluation in evaluations]


def shown(name: str) -> str:
    """A method as people write it; "before" stays what it is."""
    return name.upper() if name in METHODS else name


def interval(difference: Difference) -> str:
    return f"95% interval {difference.low:+.3f} to {difference.high:+.3f}"


def outcome(what: str, one: str, other: str, difference: Difference) -> str:
    """Whether one policy's reward exceeds another's, in a sentence (two where it can't be told)."""
    figures = f"{difference.value:+.3f} ({interval(difference)}; {difference.prompts} prompts)"
    if difference.clear:
        return f"{what} {one} earns {'more' if difference.value > 0 else 'less'} reward than {other}: {figures}."
    if difference.error == 0:
        return f"{what} {one} and {other} earn exactly the same: {figures}."
    needed = prompts_needed(difference)
    many = f"about {needed:,}" if needed < _MOST_PROMPTS else "more than a million"
    return (
        f"{what} this run cannot tell the reward of {one} from that of {other}: {figures}. To show a difference of "
        f"that size four times in five would take {many} prompts (--eval-prompts)."
    )


def prompts_needed(difference: Difference) -> int:
    """How many prompts an interval needs to exclude 0 in 80% of runs, if the difference is what was found.

    Two significant digits, at most a million.
    """
    ratio = _FOUR_IN_FIVE * difference.error / max(abs(difference.value), 1e-12)
    return int(float(f"{min(difference.prompts * ratio**2, _MOST_PROMPTS):.2g}"))


def verdict(comparison: Comparison) -> str:
    """The paper's claim, more reward at less KL, as this run sees it."""
    one, other = shown(comparison.method), shown(comparison.other)
    what = f"At equal KL ({comparison.matched_kl:.2f} nats)"
    reward, kl = comparison.reward, comparison.kl
    return (
        f"{outcome(what, one, other, comparison.reward_at_equal_kl)} After the last step, {one} minus {other} is "
        f"{reward.value:+.3f} in reward ({interval(reward)}) and {kl.value:+.2f} nats in KL "
        f"({kl.low:+.2f} to {kl.high:+.2f})."
    )
