"""The planner, and the memory that plans run in."""

import torch

import tdpo_ext
from tdpo_ext.fused.plan import ChunkedPlan, Sizes, StreamingPlan, make_plan
from tdpo_ext.ops import memory

SIZES = Sizes(vocab=1000, width=64, ref_width=64, weight_bytes=4, logit_bytes=4, needs_weight_grad=True)
LOW_PRECISION = Sizes(vocab=1000, width=64, ref_width=64, weight_bytes=2, logit_bytes=4, needs_weight_grad=True)


def test_plan_kinds():
    lengths = [20, 30, 25, 5]
    everything = make_plan(lengths, SIZES, 1 << 30)
    assert isinstance(everything, ChunkedPlan)
    assert everything.chunks == ((0, 4),)
    some = make_plan(lengths, SIZES, 300_000)
    assert isinstance(some, ChunkedPlan)
    assert len(some.chunks) > 1
    assert [pair for first, stop in some.chunks for pair in range(first, stop)] == [0, 1, 2, 3]
    assert some.bytes <= some.budget
    streamed = make_plan(lengths, SIZES, 200_000)
    assert isinstance(streamed, StreamingPlan)
    assert "30 rows" in str(streamed)


def test_low_precision_accumulator_is_part_of_the_budget():
    budget = 1000 * 64 * 4 + 40 * (1000 * LOW_PRECISION.entry + LOW_PRECISION.row)
    assert isinstance(make_plan([30] * 10, LOW_PRECISION, budget), ChunkedPlan)
    streamed = make_plan([30] * 10, LOW_PRECISION, budget - 20 * 1000 * LOW_PRECISION.entry)
    assert isinstance(streamed, StreamingPlan)
    assert "weight gradient" in str(streamed)


def test_few_rows_keep_their_dz():
    kept = make_plan([30, 30], LOW_PRECISION, LOW_PRECISION.kept_dz(60) + 35 * (1000 * 8 + LOW_PRECISION.row))
    assert isinstance(kept, ChunkedPlan)
    assert kept.keeps_dz
    assert len(kept.chunks) == 2
    budget = 1000 * 64 * 4 + 40 * (1000 * LOW_PRECISION.entry + LOW_PRECISION.row)
    summed = make_plan([30] * 10, LOW_PRECISION, budget)
    assert isinstance(summed, ChunkedPlan)
    assert not summed.keeps_dz


def test_scratch_is_kept_and_released():
    tdpo_ext.release_scratch()
    first = memory.empty((16 << 20,), torch.uint8, torch.device("cpu"))
    address = first.data_ptr()
    view = first[5:]
    del first
    other = memory.empty((40 << 20,), torch.uint8, torch.device("cpu"))
    assert memory.empty((16 << 20,), torch.uint8, torch.device("cpu")).data_ptr() != address  # still in use
    tdpo_ext.release_scratch()
    del view
    second = memory.empty((15 << 20,), torch.uint8, torch.device("cpu"))
    assert second.data_ptr() == address
    second.fill_(1)
    del other
    tdpo_ext.release_scratch()
    assert second.sum() == 15 << 20
