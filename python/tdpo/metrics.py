"""Training metrics, under the names that the authors' code and TRL use."""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from tdpo_ext import TokenDivergence, rewards


@torch.no_grad()
def preference_metrics(chosen: TokenDivergence, rejected: TokenDivergence, tokens: Tensor, beta: float) -> dict:
    """Means over the pairs of a batch, as 0-dim tensors.

    Args:
        chosen, rejected: per-sequence sums, each (B,).
        tokens: response tokens of the 2B sequences, (2B,).
        beta: of the loss, for the rewards beta (logratio + KL).
    """
    reward_chosen, reward_rejected = rewards(chosen, beta=beta), rewards(rejected, beta=beta)
    return {
        "rewards/chosen": reward_chosen.mean(),
        "rewards/rejected": reward_rejected.mean(),
        "rewards/accuracies": (reward_chosen > reward_rejected).float().mean(),
        "rewards/margins": (reward_chosen - reward_rejected).mean(),
        "kl/chosen": chosen.kl.mean(),
        "kl/rejected": rejected.kl.mean(),
        "kl/margin": (rejected.kl - chosen.kl).mean(),
        "logps/chosen": chosen.logps.mean(),
        "logps/rejected": rejected.logps.mean(),
        "entropy": (chosen.entropy.sum() + rejected.entropy.sum()) / tokens.sum().clamp(min=1),
    }


class MetricMeans:
    """Means of metrics between two logs, kept per split; tensors are read only when a mean is asked for."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))

    def add(self, split: str, metrics: dict[str, Tensor]) -> None:
        for name, value in metrics.items():
            self._values[split][name].append(value)

    def take(self, split: str) -> dict[str, float]:
        """The means of a split, which starts again from nothing."""
        values = self._values.pop(split, {})
        return {name: torch.stack(series).mean().item() for name, series in values.items()}
