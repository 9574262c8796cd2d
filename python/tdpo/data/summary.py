"""What became of a data set's rows when they were tokenized."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

_BARS = 8  # of a histogram
_WIDTH = 40  # of its longest, in characters
_LABEL = 28  # width of what stands before a bar


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
            parts.append("cut " + ", ".join(f"{name}: {count:,}" for name, count in cut.items() if count))
        if self.context:
            parts.append(f"{self.context:,} response tokens are context")
        parts.append("tokens: " + ", ".join(f"{name} {_range(values)}" for name, values in self._lengths().items()))
        return "; ".join(parts)

    def table(self) -> str:
        """The lengths of prompts and responses, in tokens."""
        lines = [f"  {'tokens':<8}{'shortest':>10}{'median':>10}{'longest':>10}"]
        for name, values in self._lengths().items():
            numbers = (values.min(), np.median(values), values.max())
            lines.append(f"  {name:<8}" + "".join(f"{number:>10,.0f}" for number in numbers))
        return "\n".join(lines)

    def histogram(self, limit: int | None = None) -> str:
        """How many pairs have how many tokens, prompt and longer response together.

        Args:
            limit: a length to mark: `max_length`.
        """
        lengths = self.prompts + np.maximum(self.chosen, self.rejected)
        step = 1 << ((int(np.ptp(lengths)) // _BARS).bit_length())
        groups = (lengths - 1) // step  # the first has the lengths from 1 to `step`
        counts = np.bincount(groups - groups.min())
        lines = [f"  {'prompt and longer response':<{_LABEL}}pairs"]
        for group, count in enumerate(counts.tolist(), start=groups.min()):
            begin, end = group * step + 1, (group + 1) * step
            label = f"{begin:>8,} to {end:,}" if step > 1 else f"{begin:>8,}"
            bar = "█" * -(-_WIDTH * count // counts.max())
            mark = f"  <- max_length, {limit:,}" if limit is not None and begin <= limit <= end else ""
            lines.append(f"  {label:<{_LABEL}}{bar} {count:,}{mark}")
        return "\n".join(lines)

    def _lengths(self) -> dict[str, np.ndarray]:
        return {"prompt": self.prompts, "chosen": self.chosen, "rejected": self.rejected}


def listed(dropped: Counter[str]) -> str:
    """The reasons why rows were dropped, with their counts."""
    return ", ".join(f"{count:,} with {reason}" for reason, count in dropped.most_common())


def _range(values: np.ndarray) -> str:
    return f"{values.min():,} to {values.max():,} (median {np.median(values):,.0f})"
