"""The planner, and the memory that plans run in."""

import torch

import tdpo_ext
from tdpo_ext import ops
from tdpo_ext.plan import Costs, make_plan

COSTS = Costs(vocab=1000, width=64, ref_width=64, element=4, logit=4, needs_weight_grad=True)


def test_plan_kinds():
    cpu = torch.device("cpu")
    lengths = [20, 30, 25, 5]
    everything = make_plan(lengths, COSTS, 1 << 30, cpu)
    assert (everything.kind, everything.pairs) == ("resident", ((0, 4),))
    some = make_plan(lengths, COSTS, 300_000, cpu)
    assert some.kind == "resident"
    assert len(some.pairs) > 1
    assert [pair for first, stop in some.pairs for pair in range(first, stop)] == [0, 1, 2, 3]
    assert some.bytes <= some.budget
    streamed = make_plan(lengths, COSTS, 200_000, cpu)
    assert streamed.kind == "streaming"
    assert "30 rows" in str(streamed)


def test_low_precision_accumulator_is_part_of_the_budget():
    low = Costs(vocab=1000, width=64, ref_width=64, element=2, logit=4, needs_weight_grad=True)
    cpu = torch.device("cpu")
    budget = 1000 * 64 * 4 + 40 * (1000 * low.entry + low.row)
    assert make_plan([30] * 10, low, budget, cpu).kind == "resident"
    streamed = make_plan([30] * 10, low, budget - 20 * 1000 * low.entry, cpu)
    assert streamed.kind == "streaming"
    assert "weight gradient" in str(streamed)


def test_few_rows_keep_their_dz():
    low = Costs(vocab=1000, width=64, ref_width=64, element=2, logit=4, needs_weight_grad=True)
    cpu = torch.device("cpu")
    kept = make_plan([30, 30], low, low.kept_dz(60) + 35 * (1000 * 8 + low.row), cpu)
    assert kept.keeps_dz
    assert len(kept.pairs) == 2
    summed = make_plan([30] * 10, low, 1000 * 64 * 4 + 40 * (1000 * low.entry + low.row), cpu)
    assert not summed.keeps_dz
    assert summed.kind == "resident"


def test_scratch_is_kept_and_released():
    tdpo_ext.release_scratch()
    first = ops.empty((16 << 20,), torch.uint8, torch.device("cpu"))
    address = first.data_ptr()
    view = first[5:]
    del first
    other = ops.empty((40 << 20,), torch.uint8, torch.device("cpu"))
    assert ops.empty((16 << 20,), torch.uint8, torch.device("cpu")).data_ptr() != address  # still in use
    tdpo_ext.release_scratch()
    del view
    second = ops.empty((15 << 20,), torch.uint8, torch.device("cpu"))
    assert second.data_ptr() == address
    second.fill_(1)
    del other
    tdpo_ext.release_scratch()
    assert second.sum() == 15 << 20
