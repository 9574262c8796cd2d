"""Training metrics with the names and meanings that they have in TRL, and TDPO's own.

TRL's `logits/*`, means of all logits, are left out: a constant added to a row's logits moves them and changes no
probability, and the fused loss never holds logits to sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from tdpo_ext import rewards

from .preference_loss import PreferenceOutput


class PairMetric(NamedTuple):
    """A metric of every pair of a batch, (B,) each; its mean over pairs is `values.sum() / weights.sum()`."""

    values: Tensor
    weights: Tensor


@torch.no_grad()
def preference_metrics(output: PreferenceOutput, beta: float, *, has_reference: bool = True) -> dict[str, PairMetric]:
    """Every metric of a batch, weighted by its pairs or by its response tokens.

    Args:
        output: of `PreferenceLoss`.
        beta: of the loss: `rewards/*` are those of DPO, beta logratio, and `rewards_with_kl/*` those that the authors
            of TDPO log, beta (logratio + KL).
        has_reference: without one there is no KL, and `rewards/*` are those of SimPO, beta times the mean
            log-probability of a token.
    """
    chosen, rejected = output.chosen, output.rejected
    of_pairs = {"logps/chosen": chosen.logps, "logps/rejected": rejected.logps}
    if has_reference:
        of_pairs |= {
            **_reward_metrics("rewards", beta * chosen.logratio, beta * rejected.logratio),
            **_reward_metrics("rewards_with_kl", rewards(chosen, beta=beta), rewards(rejected, beta=beta)),
            "kl/chosen": chosen.kl,
            "kl/rejected": rejected.kl,
            "kl/margin": rejected.kl - chosen.kl,
        }
    else:
        means = (beta * side.logps / side.tokens.clamp(min=1) for side in (chosen, rejected))
        of_pairs |= _reward_metrics("rewards", *means)
    metrics = {name: PairMetric(values, torch.ones_like(values)) for name, values in of_pairs.items()}
    metrics["entropy"] = PairMetric(chosen.entropy + rejected.entropy, chosen.tokens + rejected.tokens)
    metrics["mean_token_accuracy"] = PairMetric(chosen.correct, chosen.tokens)  # on chosen tokens, as in TRL
    if output.router_loss is not None:  # one value a batch, the same for all its pairs
        metrics["aux_loss"] = PairMetric(output.router_loss.expand_as(chosen.tokens), torch.ones_like(chosen.tokens))
    return metrics


def _reward_metrics(name: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        f"{name}/chosen": chosen,
        f"{name}/rejected": rejected,
        f"{name}/accuracies": (chosen > rejected).float(),
        f"{name}/margins": chosen - rejected,
    }


class MetricMeans:
    """Weighted means of metrics between two logs; the host reads tensors only in `take`."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, Tensor] = {}

    def add(self, metrics: dict[str, PairMetric]) -> None:
        for name, entries in _tables(metrics).items():
            self._sums[name] = self._sums.get(name, 0) + entries.sum(0)

    def take(self) -> dict[str, float]:
        """The means over all processes, which must all call this; resets the sums."""
        sums, self._sums = self._sums, {}
        if not sums:
            return {}
        return _means(sums, self._accelerator.reduce(torch.stack(list(sums.values())), "sum"))


class DatasetMeans:
    """Weighted means of metrics over a data set.

    So that several processes run the same number of batches, their loaders repeat some rows of the data set. Metrics
    are therefore kept row by row, and each row counts once.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self._rows: list[Tensor] = []
        self._tables: dict[str, list[Tensor]] = defaultdict(list)

    def add(self, rows: Tensor, metrics: dict[str, PairMetric]) -> None:
        """Adds the metrics of a batch, which holds these rows of the data set, (B,)."""
        self._rows.append(rows)
        for name, entries in _tables(metrics).items():
            self._tables[name].append(entries)

    def take(self) -> dict[str, float]:
        """The means over the rows of all processes, which must all call this; resets the rows."""
        if not self._rows:
            return {}
        rows = self._gather(torch.cat(self._rows), padding=-1)
        table = self._gather(torch.stack([torch.cat(entries) for entries in self._tables.values()], 1), padding=0)
        names = list(self._tables)
        self._rows, self._tables = [], defaultdict(list)
        numbers, first = np.unique(rows.cpu().numpy(), return_index=True)
        return _means(names, table[first[numbers >= 0]].sum(0))

    def _gather(self, values: Tensor, padding: int) -> Tensor:
        """The entries of all processes; some may have fewer than others."""
        return self._accelerator.gather(self._accelerator.pad_across_processes(values, pad_index=padding))


def _tables(metrics: dict[str, PairMetric]) -> dict[str, Tensor]:
    """Values and weights of every metric, (B, 2), in float64: sums over a data set must not lose digits."""
    return {name: torch.stack([values, weights], 1).double() for name, (values, weights) in metrics.items()}


def _means(names: Iterable[str], totals: Tensor) -> dict[str, float]:  # totals (metrics, 2)
    return {name: total / max(weight, 1e-9) for name, (total, weight) in zip(names, totals.tolist())}
