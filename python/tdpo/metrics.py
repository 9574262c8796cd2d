"""Training metrics, under the names that the authors' code and TRL use."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from tdpo_ext import TokenDivergence, rewards

from .loss import PreferenceOutput


@torch.no_grad()
def preference_metrics(
    output: PreferenceOutput, tokens: Tensor, beta: float
) -> dict[str, tuple[Tensor, float | Tensor]]:
    """(sum, weight) of every metric of a batch: the mean over pairs, or over tokens, is sum / weight.

    Args:
        output: of `PreferenceLoss`.
        tokens: response tokens of the 2B sequences, (2B,).
        beta: of the loss, for the rewards beta (logratio + KL).
    """
    chosen, rejected = output.chosen, output.rejected
    pairs = len(tokens) // 2
    per_pair = _rewards(chosen, rejected, beta) | {
        "kl/chosen": chosen.kl,
        "kl/rejected": rejected.kl,
        "kl/margin": rejected.kl - chosen.kl,
        "logps/chosen": chosen.logps,
        "logps/rejected": rejected.logps,
    }
    found: dict[str, tuple[Tensor, float | Tensor]] = {name: (v.sum(), pairs) for name, v in per_pair.items()}
    found["entropy"] = (chosen.entropy.sum() + rejected.entropy.sum(), tokens.sum())
    found["mean_token_accuracy"] = (output.correct[:pairs].sum(), tokens[:pairs].sum())  # of chosen tokens, as TRL's
    return found


def _rewards(chosen: TokenDivergence, rejected: TokenDivergence, beta: float) -> dict[str, Tensor]:
    reward_chosen, reward_rejected = rewards(chosen, beta=beta), rewards(rejected, beta=beta)
    return {
        "rewards/chosen": reward_chosen,
        "rewards/rejected": reward_rejected,
        "rewards/accuracies": (reward_chosen > reward_rejected).float(),
        "rewards/margins": reward_chosen - reward_rejected,
    }


class MetricMeans:
    """Weighted means of metrics between two logs, kept per split; tensors are read only when means are asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, split: str, metrics: dict[str, tuple[Tensor, float | Tensor]]) -> None:
        for name, (total, weight) in metrics.items():
            entry = torch.stack([total.double(), torch.as_tensor(weight, device=total.device).double()])
            sums = self._sums[split]
            sums[name] = sums[name] + entry if name in sums else entry

    def take(self, split: str, reduce: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """The means of a split over all processes, which `reduce` sums over; the split starts again from nothing."""
        sums = self._sums.pop(split, {})
        if not sums:
            return {}
        totals = reduce(torch.stack(list(sums.values()))).tolist()
        return {name: total / max(weight, 1e-9) for name, (total, weight) in zip(sums, totals)}
