"""Training metrics, under the names that the authors' code and TRL use."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from tdpo_ext import rewards

from .loss import PreferenceOutput


class WeightedSum(NamedTuple):
    """A metric of a batch, whose mean is `total / weight`."""

    total: Tensor
    weight: Tensor | float


@torch.no_grad()
def preference_metrics(output: PreferenceOutput, beta: float) -> dict[str, WeightedSum]:
    """Every metric of a batch, weighted by its pairs or by its response tokens.

    Args:
        output: of `PreferenceLoss`.
        beta: of the loss, for the rewards beta (logratio + KL).
    """
    chosen, rejected = output.chosen, output.rejected
    reward_chosen, reward_rejected = rewards(chosen, beta=beta), rewards(rejected, beta=beta)
    per_pair = {
        "rewards/chosen": reward_chosen,
        "rewards/rejected": reward_rejected,
        "rewards/accuracies": (reward_chosen > reward_rejected).float(),
        "rewards/margins": reward_chosen - reward_rejected,
        "kl/chosen": chosen.kl,
        "kl/rejected": rejected.kl,
        "kl/margin": rejected.kl - chosen.kl,
        "logps/chosen": chosen.logps,
        "logps/rejected": rejected.logps,
    }
    metrics = {name: WeightedSum(values.sum(), len(values)) for name, values in per_pair.items()}
    tokens = chosen.tokens.sum()
    metrics["entropy"] = WeightedSum(chosen.entropy.sum() + rejected.entropy.sum(), tokens + rejected.tokens.sum())
    metrics["mean_token_accuracy"] = WeightedSum(chosen.correct.sum(), tokens)  # of chosen tokens, as TRL's
    return metrics


class MetricMeans:
    """Weighted means of metrics between two logs, kept per split; the host reads tensors only in `take`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, dict[str, Tensor]] = defaultdict(dict)

    def add(self, split: str, metrics: dict[str, WeightedSum]) -> None:
        sums = self._sums[split]
        for name, (total, weight) in metrics.items():
            entry = torch.stack([total.double(), torch.as_tensor(weight, device=total.device).double()])
            sums[name] = sums[name] + entry if name in sums else entry

    def take(self, split: str) -> dict[str, float]:
        """The means of a split over all processes, each of which must call; the split's sums are reset."""
        sums = self._sums.pop(split, {})
        if not sums:
            return {}
        totals = self._accelerator.reduce(torch.stack(list(sums.values())).float(), "sum").tolist()
        return {name: total / max(weight, 1e-9) for name, (total, weight) in zip(sums, totals)}
