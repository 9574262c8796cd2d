"""Pairs, or sequences alone, of plausible values, on which an objective is tried before the real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergence import TokenDivergence, TokenRows, segment_sums

_CHOSEN_TOKENS = (2, 3, 4, 7, 40, 19, 9, 28, 12)  # of every pair there is; the rejected response is one longer
FEW, MANY = range(3), range(len(_CHOSEN_TOKENS))

Side = TokenDivergence | TokenRows


@dataclass(frozen=True)
class MadeUpPairs:
    """Some pairs; their values depend on nothing else in the call, and are new tensors at every call.

    Attributes:
        count: sides of a pair: 2, or 1 for sequences alone.
        without_reference: what ref_logps and kl are where there is no reference; None: there is one.
        tokens: whether as TokenRows, instead of TokenDivergence of sums.
        columns: names of token columns.
    """

    count: int
    without_reference: float | None
    tokens: bool
    device: torch.device
    columns: Sequence[str]

    def sides(self, pairs: Sequence[int], shift: float = 0.0) -> list[Side]:
        """Chosen and rejected of these pairs; `shift` changes everything but `tokens` and columns."""
        return [self._side(pairs, side, shift) for side in range(self.count)]

    def _side(self, pairs: Sequence[int], side: int, shift: float) -> Side:
        lengths = torch.tensor([_CHOSEN_TOKENS[pair] + side for pair in pairs], device="cpu")
        drawn = [_draw(pair, side, shift, len(self.columns)) for pair in pairs]
        values = torch.cat([of_pair for of_pair, _ in drawn], dim=1)
        if self.without_reference is not None:
            values[1:3] = self.without_reference
        columns = torch.cat([of_pair for _, of_pair in drawn], dim=1).to(self.device)
        if not self.tokens:
            made_up = TokenDivergence.unstack(
                segment_sums(values.t(), lengths=lengths).t().contiguous().to(self.device)
            )
            return made_up._replace(logps=made_up.logps.requires_grad_(), kl=made_up.kl.requires_grad_())
        logps, ref_logps, kl, entropy, correct, tokens = values.to(self.device).unbind(0)
        return TokenRows(
            logps=logps.requires_grad_(),
            ref_logps=ref_logps,
            kl=kl.requires_grad_(),
            entropy=entropy,
            correct=correct,
            tokens=tokens,
            columns=dict(zip(self.columns, columns)),
            rows_of_pair=lengths.to(self.device),
        )

    def describe(self, pairs: Sequence[int]) -> str:
        """As words, for an error message."""
        lengths = (" and ".join(str(_CHOSEN_TOKENS[pair] + side) for side in range(self.count)) for pair in pairs)
        return f"{len(pairs)} made-up {self.what}{'s' * (len(pairs) > 1)} of {', '.join(lengths)} tokens"

    @property
    def what(self) -> str:
        """What an objective takes together."""
        return "pair" if self.count == 2 else "sequence"


def entries(side: Side, pair: int) -> slice:
    """The entries of the pair at this place in each of the side's fields."""
    if isinstance(side, TokenDivergence):
        return slice(pair, pair + 1)
    first = int(side.rows_of_pair[:pair].sum())
    return slice(first, first + int(side.rows_of_pair[pair]))


def _draw(pair: int, side: int, shift: float, columns: int) -> tuple[Tensor, Tensor]:
    """Values (fields, tokens) of one response, in the order of TokenDivergence, and its columns (columns, tokens)."""
    generator = torch.Generator("cpu").manual_seed(7 + 2 * pair + side)
    tokens = _CHOSEN_TOKENS[pair] + side

    def draw(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(tokens, generator=generator, device="cpu")

    logps = draw(-4.0, -0.5) - shift
    ref_logps = logps + draw(-0.5, 0.5) - shift
    kl = draw(0.05, 0.4) * (1 + shift)
    entropy = draw(0.5, 2.0) + shift
    correct = (draw(0.0, 1.0) < 0.5).float()
    values = torch.stack([logps, ref_logps, kl, entropy, correct, torch.ones_like(kl)])
    return values, torch.stack([draw(0.1, 1.0) for _ in range(columns)]) if columns else kl.new_empty(0, tokens)
