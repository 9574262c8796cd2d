"""Metrics and their means, against values worked out by hand."""

import pytest
import torch
from accelerate import Accelerator
from tdpo.loss.metrics import DatasetMeans, MetricMeans, preference_metrics
from tdpo.loss.preference_loss import PreferenceOutput

from tdpo_ext import TokenDivergence


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def sequences(**values):
    """Sums over sequences; a quantity that is not given is zero."""
    size = len(next(iter(values.values())))
    return TokenDivergence(**{name: torch.tensor(values.get(name, [0.0] * size)) for name in TokenDivergence._fields})


# Rewards with beta 0.5: chosen 0.5 * 2 = 1, 0.5 * -1 = -0.5; rejected 0.5 * 1 = 0.5, 0.5 * -3 = -1.5. With the KL:
# chosen 0.5 (2 + 1) = 1.5, 0.5 (-1 + 1) = 0; rejected 0.5 (1 + 3) = 2, 0.5 (-3 + 3) = 0, a tie.
FIRST = PreferenceOutput(
    torch.tensor(0.0),
    sequences(
        logps=[-4.0, -6.0],
        ref_logps=[-6.0, -5.0],
        kl=[1.0, 1.0],
        entropy=[2.0, 6.0],
        correct=[1.0, 0.0],
        tokens=[2.0, 4.0],
    ),
    sequences(
        logps=[-8.0, -9.0],
        ref_logps=[-9.0, -6.0],
        kl=[3.0, 3.0],
        entropy=[3.0, 1.0],
        correct=[5.0, 5.0],
        tokens=[5.0, 9.0],
    ),
)
# Rewards: chosen 0.5 * 3 = 1.5, rejected 0; with the KL: chosen 0.5 (3 + 0) = 1.5, rejected 0.5 (0 + 1) = 0.5.
SECOND = PreferenceOutput(
    torch.tensor(0.0),
    sequences(logps=[-1.0], ref_logps=[-4.0], kl=[0.0], entropy=[8.0], correct=[6.0], tokens=[6.0]),
    sequences(logps=[-2.0], ref_logps=[-2.0], kl=[1.0], entropy=[4.0], correct=[0.0], tokens=[2.0]),
)
OF_FIRST = {
    "rewards/chosen": 0.25,
    "rewards/rejected": -0.5,
    "rewards/accuracies": 1.0,
    "rewards/margins": 0.75,
    "rewards_with_kl/chosen": 0.75,
    "rewards_with_kl/rejected": 1.0,
    "rewards_with_kl/accuracies": 0.0,  # one is lower, one is a tie
    "rewards_with_kl/margins": -0.25,
    "kl/chosen": 1.0,
    "kl/rejected": 3.0,
    "kl/margin": 2.0,
    "logps/chosen": -5.0,
    "logps/rejected": -8.5,
    "entropy": 12 / 20,  # over all tokens
    "mean_token_accuracy": 1 / 6,  # over chosen tokens
}
OF_BOTH = {
    "rewards/chosen": 2 / 3,
    "rewards/rejected": -1 / 3,
    "rewards/accuracies": 1.0,
    "rewards/margins": 1.0,
    "rewards_with_kl/chosen": 1.0,
    "rewards_with_kl/rejected": 2.5 / 3,
    "rewards_with_kl/accuracies": 1 / 3,
    "rewards_with_kl/margins": 0.5 / 3,
    "kl/chosen": 2 / 3,
    "kl/rejected": 7 / 3,
    "kl/margin": 5 / 3,
    "logps/chosen": -11 / 3,
    "logps/rejected": -19 / 3,
    "entropy": 24 / 28,
    "mean_token_accuracy": 7 / 12,
}


def test_means_between_logs(accelerator):
    means = MetricMeans(accelerator)
    means.add(preference_metrics(FIRST, beta=0.5))
    assert means.take() == pytest.approx(OF_FIRST)
    assert means.take() == {}  # the sums start anew
    for output in (FIRST, SECOND):  # a pair weighs the same in a batch of two and of one
        means.add(preference_metrics(output, beta=0.5))
    assert means.take() == pytest.approx(OF_BOTH)


def test_every_row_of_a_data_set_counts_once(accelerator):
    means = DatasetMeans(accelerator)
    means.add(torch.tensor([7, 3]), preference_metrics(FIRST, beta=0.5))
    means.add(torch.tensor([0]), preference_metrics(SECOND, beta=0.5))
    means.add(torch.tensor([7, 3]), preference_metrics(FIRST, beta=0.5))  # what a loader adds to fill the last batch
    assert means.take() == pytest.approx(OF_BOTH)
    assert means.take() == {}


def test_sums_keep_their_digits(accelerator):
    """A million logps of -50,000.25: the mean of a float32 sum would be off by 0.004."""
    means, rows = MetricMeans(accelerator), 100_000
    for value in [-50_000.25] * 10:
        chosen = sequences(logps=[value] * rows)
        means.add(preference_metrics(PreferenceOutput(torch.tensor(0.0), chosen, chosen), beta=0.1))
    assert means.take()["logps/chosen"] == -50_000.25
