"""Batches as training meets them, of pairs of any lengths at any budget, against float64; every path must be met."""

import hypothesis
import torch.distributed as dist

from helpers.any_batch import checked_batches
from helpers.device import DEVICE
from helpers.distributed import run_on_ranks
from helpers.paths_met import KINDS
from tdpo_ext import VocabShard

# Ranks of a shard exchange rows, so that they drop none; nor does a GPU, where the host would wait.
ROWS_DROPPED = {"flush: rows without gradient dropped", "streaming: no rows"}
ON_CPU = ROWS_DROPPED | {"flush: dz over wider logits", "streaming: dz over wider logits"}
NOT_SHARDED = ROWS_DROPPED | {"long pair: any loss of a frozen head"}


def assert_all_met(counts, kinds):
    assert set(counts) == kinds, f"never met: {kinds - set(counts)}; not expected: {set(counts) - kinds}"


def test_gradients_of_any_batch_are_those_of_float64():
    """1,000 batches, and ten times as many in `make test-nightly`."""
    kinds = KINDS if DEVICE == "cpu" else KINDS - ON_CPU
    assert_all_met(checked_batches(range(5 * hypothesis.settings().max_examples)), kinds)


def any_sharded_batch(rank, world, device):
    def shard_of(batch, draw):
        """This rank's part of two, at any place; one may be empty."""
        middle = draw.randint(0, batch.vocab)
        batch.budget = batch.budget * max(middle, batch.vocab - middle) // batch.vocab + 1  # plans as without a shard
        bounds = [0, middle, batch.vocab]
        return VocabShard(bounds[rank], bounds[rank + 1], dist.group.WORLD)

    assert_all_met(checked_batches(range(5 * hypothesis.settings().max_examples), shard_of), KINDS - NOT_SHARDED)


def test_gradients_of_any_sharded_batch_are_those_of_float64(tmp_path):
    outcomes = run_on_ranks({"any_sharded_batch": any_sharded_batch}, 2, "cpu", tmp_path)
    failed = [outcome for outcome in outcomes.values() if outcome]
    assert not failed, "\n".join(failed)
