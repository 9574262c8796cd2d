"""What became of a data set's rows when they were tokenized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

_BARS = 8  # of a histogram
_WIDTH = 40  # of its longest, in characters


@dataclass
class Summary:
    """Counts and lengths of preferences as tokens.

    Attributes:
        rows: of the data set.
        dropped: pairs and rows that can't be used, by reason.
        cut_prompts, cut_responses: kept pairs whose prompt, or a response, lost tokens to the limits.
        context: response tokens that the loss does not see: turns of others than the assistant.
        prompts, chosen, rejected: tokens of every kept pair, (pairs,).
    """

    rows: int
    dropped: Counter[str]
    cut_prompts: int
    cut_responses: int
    context: int
    prompts: np.ndarray = field(repr=False)
    chosen: np.ndarray = field(repr=False)
    rejected: np.ndarray = field(repr=False)

    @property
    def pairs(self) -> int:
        return len(self.prompts)

    def __str__(self) -> str:
        """One line."""
        parts = [f"{self.pairs:,} pairs of {self.rows:,} rows"]
        if self.dropped:
            parts.append(f"dropped {self.dropped.total():,}: {listed(self.dropped)}")
        cut = {"prompts": self.cut_prompts, "responses": self.cut_responses}
        if any(cut.values()):
            parts.append("cut " + " and ".join(f"{count:,} {name}" for name, count in cut.items() if count))
        if self.context:
            parts.append(f"{self.context:,} response tokens are context")
        lengths = {"prompts": self.prompts, "chosen": self.chosen, "rejected": self.rejected}
        parts.append("tokens: " + ", ".join(f"{name} {_range(values)}" for name, values in lengths.items()))
        return "; ".join(parts)

    def histogram(self) -> str:
        """How many pairs have how many tokens, prompt and longer response together."""
        lengths = self.prompts + np.maximum(self.chosen, self.rejected)
        step = max(1, -(-int(lengths.max() + 1) // _BARS))
        counts = np.bincount(lengths // step)
        lines = []
        for place, count in enumerate(counts):
            bar = "█" * round(_WIDTH * count / counts.max())
            lines.append(f"{place * step:>7,} to {(place + 1) * step - 1:<7,} {bar} {count:,}")
        return "\n".join(lines)


def listed(dropped: Counter[str]) -> str:
    """The reasons why rows were dropped, with their counts."""
    return ", ".join(f"{count:,} with {reason}" for reason, count in dropped.most_common())


def _range(values: np.ndarray) -> str:
    return f"{values.min():,} to {values.max():,} (median {np.median(values):,.0f})"
