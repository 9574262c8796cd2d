"""What a run of the demo found: curves, differences with their intervals, a verdict, and samples."""

from __future__ import annotations

import functools
import itertools
from dataclasses import asdict, dataclass
from typing import Any

from .comparison import Difference, compare, reward_after
from .evaluation import Evaluation, Point, matched_kl
from .examples import Example, all_examples, differing
from .verdict import Comparison, compare_methods, outcome, shown, verdict

EXAMPLES = 4  # kept and printed


@dataclass(frozen=True)
class Results:
    """The evaluations of every method, in order of their steps, and what follows from them."""

    prompts: list[str]
    evaluations: dict[str, list[Evaluation]]

    @property
    def before(self) -> Evaluation:
        """The model that all methods start from."""
        return next(iter(self.evaluations.values()))[0]

    @functools.cached_property
    def curves(self) -> dict[str, list[Point]]:
        return {name: [each.point() for each in evaluations] for name, evaluations in self.evaluations.items()}

    @functools.cached_property
    def matched_kl(self) -> list[dict[str, float]]:
        return matched_kl(self.curves)

    @functools.cached_property
    def gains(self) -> dict[str, list[Difference]]:
        """By how much each method's reward exceeds that of the start after every evaluation but the first."""
        return {
            name: [compare(reward_after, [evaluation], [self.before]) for evaluation in evaluations[1:]]
            for name, evaluations in self.evaluations.items()
        }

    @functools.cached_property
    def comparisons(self) -> list[Comparison]:
        """Every method beside those that come before it, the last beside the first at the end."""
        pairs = [(later, name) for name, later in itertools.combinations(self.evaluations, 2)]
        first, last = next(iter(self.evaluations)), list(self.evaluations)[-1]
        pairs.sort(key=lambda pair: pair == (last, first))
        return [compare_methods(later, name, self.evaluations) for later, name in pairs]

    @functools.cached_property
    def verdict(self) -> str:
        """Of the last method beside the first, or of the only one beside the start."""
        if self.comparisons:
            return verdict(self.comparisons[-1])
        name, gains = next(iter(self.gains.items()))
        return outcome("After the last step", shown(name), "the start", gains[-1])

    @functools.cached_property
    def examples(self) -> list[Example]:
        last = {name: evaluations[-1] for name, evaluations in self.evaluations.items()}
        return all_examples(self.prompts, {"before": self.before, **last})

    def saved(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "prompts": len(self.prompts),
            "curves": self.curves,
            "matched_kl": self.matched_kl,
            "gains": {name: [asdict(gain) for gain in gains] for name, gains in self.gains.items()},
            "comparisons": [asdict(comparison) for comparison in self.comparisons],
            "verdict": self.verdict,
            "prompts_with_differing_texts": differing(self.examples),
            "examples": self.examples[:EXAMPLES],
        }
