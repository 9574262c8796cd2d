"""The planner, and the memory that plans run in."""

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tdpo_ext
from helpers.planning import llm_sizes
from tdpo_ext.fused.planning.choose import make_plan, streaming_plan
from tdpo_ext.fused.planning.costs import RATES
from tdpo_ext.fused.planning.cut import cut_pairs
from tdpo_ext.fused.planning.plan import (
    ChunkedPlan,
    LongPair,
    StreamingPlan,
    WholePairs,
    cuda_budget,
)
from tdpo_ext.fused.planning.sizes import Sizes, row_pitch
from tdpo_ext.ops import memory

ROOT = Path(__file__).parent.parent.parent
SIZES = Sizes(vocab=1000, width=64, ref_width=64, weight_bytes=4, logit_bytes=4, needs_weight_grad=True)
LOW_PRECISION = Sizes(vocab=1000, width=64, ref_width=64, weight_bytes=2, logit_bytes=4, needs_weight_grad=True)


@pytest.mark.usefixtures("large_calls")
def test_plan_kinds():
    lengths = [20, 30, 25, 5]
    everything = make_plan(lengths, SIZES, 1 << 30)
    assert isinstance(everything, ChunkedPlan)
    assert everything.chunks == (WholePairs(0, 4),)
    some = make_plan(lengths, SIZES, 300_000)
    assert isinstance(some, ChunkedPlan)
    assert len(some.chunks) > 1
    assert [pair for chunk in some.chunks for pair in chunk.pairs] == [0, 1, 2, 3]
    assert some.bytes <= some.budget
    streamed = make_plan(lengths, SIZES, 200_000)
    assert isinstance(streamed, StreamingPlan)
    assert "30 rows" in str(streamed)


@pytest.mark.usefixtures("large_calls")
def test_low_precision_accumulator_is_part_of_the_budget():
    budget = 1000 * 64 * 4 + 40 * (1000 * LOW_PRECISION.entry + LOW_PRECISION.row)
    assert isinstance(make_plan([30] * 10, LOW_PRECISION, budget), ChunkedPlan)
    streamed = make_plan([30] * 10, LOW_PRECISION, budget - 25 * 1000 * LOW_PRECISION.entry)
    assert isinstance(streamed, StreamingPlan)
    assert "weight gradient" in str(streamed)


@pytest.mark.parametrize("sizes", [SIZES, LOW_PRECISION, replace(LOW_PRECISION, is_half=True)])
def test_nothing_fits_any_budget(sizes):
    plan = make_plan([0, 0], sizes, 1, can_defer=True)
    assert isinstance(plan, ChunkedPlan)
    assert plan.chunks == (WholePairs(0, 2),)


@pytest.mark.usefixtures("large_calls")
def test_few_rows_keep_their_dz():
    kept = make_plan([30, 30], LOW_PRECISION, 60 * LOW_PRECISION.dz_row + 35 * (1000 * 8 + LOW_PRECISION.row))
    assert isinstance(kept, ChunkedPlan)
    assert kept.keeps_dz
    assert len(kept.chunks) == 2
    budget = 500 * 64 * 4 + 40 * (1000 * LOW_PRECISION.entry + LOW_PRECISION.row)
    summed = make_plan([30] * 10, LOW_PRECISION, budget)
    assert isinstance(summed, ChunkedPlan)
    assert summed.sums_weight


@pytest.mark.usefixtures("large_calls")
def test_no_chunk_exceeds_the_budget():
    """Chunks are evened out, but never beyond what fits."""
    row = SIZES.whole_row
    plan = make_plan([9, 1, 1, 9, 9], SIZES, 10 * row)
    assert isinstance(plan, ChunkedPlan)
    assert plan.rows <= 10
    assert plan.bytes <= plan.budget


def test_chunks_are_evened_out():
    cut = cut_pairs((2,) * 10, 18)
    assert cut.chunks == (WholePairs(0, 5), WholePairs(5, 10))
    assert cut.rows == 10


@pytest.mark.usefixtures("large_calls")
def test_plans_cover_all_pairs_within_the_budget():
    """Plans of any lengths and budget; those of long pairs, of each kind, are among them."""
    draw, kinds = random.Random(0), Counter()
    for _ in range(4000):
        longest = draw.choice([60, 400])
        lengths = [draw.randint(0, draw.choice([20, longest])) for _ in range(draw.randint(1, 12))]
        low_precision = draw.random() < 0.5
        sizes = Sizes(
            vocab=draw.choice([1000, 1100]),  # without a pitch, and with one
            width=draw.choice([64, 600]),
            ref_width=32,
            weight_bytes=2 if low_precision else 4,
            logit_bytes=4,
            needs_weight_grad=draw.random() < 0.7,
            is_half=low_precision and draw.random() < 0.5,
            dz_in_place=draw.random() < 0.5,
        )
        can_defer = draw.random() < 0.8
        plan = make_plan(lengths, sizes, draw.randint(1, 500) * sizes.whole_row, can_defer=can_defer)
        kinds[check_plan(plan, lengths, sizes, can_defer)] += 1
    assert set(kinds) == {"streaming", "whole", "kept", "block", "apart", "apart, several blocks kept"}
    assert min(kinds.values()) >= 20, kinds


def check_plan(plan, lengths, sizes, can_defer):
    """The kind of a plan; AssertionError where it leaves out a pair, or where its parts do not fit."""
    if isinstance(plan, StreamingPlan):
        # Its fewest columns may take more where nothing else fits.
        assert plan.bytes <= plan.budget or plan.columns == min(256, sizes.vocab)
        return "streaming"
    assert [pair for chunk in plan.chunks for pair in chunk.pairs] == list(range(len(lengths)))
    rows_of = {chunk: sum(lengths[pair] for pair in chunk.pairs) for chunk in plan.chunks}
    long = [rows for chunk, rows in rows_of.items() if isinstance(chunk, LongPair)]
    whole = [rows for chunk, rows in rows_of.items() if isinstance(chunk, WholePairs)]
    assert all(rows <= plan.rows for rows in whole)
    assert all(rows > plan.rows for rows in long)
    assert plan.deferred == bool(long)
    assert can_defer or not long
    assert plan.rows <= plan.dz_rows or sum(lengths) == 0
    # The parts of the plan, beside the logits of its rows.
    bytes = plan.rows * (sizes.row_without_dz if plan.keeps_dz else sizes.whole_row)
    bytes += plan.dz_rows * sizes.dz_row if plan.keeps_dz else 0
    bytes += sizes.weight_sum if plan.sums_weight else 0
    bytes += sizes.accumulated_weight if plan.weight_apart else 0
    assert plan.bytes == bytes
    # Logits are within the budget; beside them one dW at most for a MarginLoss, and half of one where a pair's and the
    # float32 sum of the others' are both needed.
    beyond = sizes.accumulated_weight + (sizes.weight_sum if plan.weight_apart else 0)
    assert plan.rows * sizes.row_without_dz <= plan.budget
    assert plan.bytes <= plan.budget + (beyond if can_defer else 0)
    if not long:
        return "whole"
    apart = max(long) > plan.dz_rows and len(plan.chunks) > 1
    assert plan.weight_apart == (apart and sizes.needs_weight_grad)
    if plan.keeps_dz:
        return "apart, several blocks kept" if plan.weight_apart else "kept"
    return "apart" if plan.weight_apart else "block"


def test_a_chunk_of_whole_pairs_has_no_more_rows_than_there_are_logits():
    """Pairs of 60, 60 and 180 rows at 130 rows of logits: the long one in two blocks, the others as one chunk."""
    cut = cut_pairs((60, 60, 180), 130)
    assert cut.chunks == (WholePairs(0, 2), LongPair(2))
    assert cut.rows == 120


@pytest.mark.parametrize(("limit", "rows"), [(1000, 768), (300, 256), (128, 128), (127, 125), (100, 100)])
def test_blocks_are_multiples_of_a_tile(limit, rows):
    """1,500 rows in as few equal blocks as before, of 128 rows or a multiple of these where as many fit."""
    cut = cut_pairs((1500,), limit, multiple=128)
    assert cut.rows == rows <= limit


def test_row_bytes_by_hand():
    """Per row: two float32 logits and a bfloat16 dz of 1,000 entries; hidden, its gradient, ref_hidden; 128 bytes."""
    assert LOW_PRECISION.whole_row == 1000 * (4 + 4 + 2) + 2 * (64 + 64 + 64) + 128
    assert SIZES.whole_row == 1000 * (4 + 4) + 4 * (64 + 64 + 64) + 128
    without_grad = replace(LOW_PRECISION, needs_grad=False, needs_weight_grad=False)
    assert without_grad.whole_row == 1000 * (4 + 4) + 2 * (64 + 64 + 64) + 128


def test_dz_over_wider_logits_takes_no_bytes():
    over = replace(LOW_PRECISION, dz_in_place=True)
    assert over.whole_row == LOW_PRECISION.whole_row - LOW_PRECISION.dz_row == over.row_without_dz


def test_padded_slices_keep_to_the_budget():
    """All 1,100 columns would just fit, but for their padding."""
    sizes = replace(SIZES, vocab=1100)
    plan = streaming_plan(55, sizes, 55 * sizes.whole_row - 1000, "")
    assert plan.columns == 1088
    assert plan.bytes <= plan.budget


def test_padded_rows_by_hand():
    """Rows of 50,257 entries take the memory of 50,304, in logits and in dz."""
    sizes = replace(LOW_PRECISION, vocab=50_257)
    assert sizes.dz_row == 50_304 * 2
    assert sizes.row_without_dz == 50_304 * (4 + 4) + 2 * (64 + 64 + 64) + 128
    assert sizes.whole_row == sizes.row_without_dz + sizes.dz_row
    plan = streaming_plan(10, sizes, 1 << 30, "for this test")
    assert (plan.rows, plan.columns) == (10, 50_257)  # never more than the vocabulary has
    assert plan.bytes == 10 * sizes.row + 10 * 64 * 4 + 50_304 * (10 * 10 + 64 * 4)


@pytest.mark.parametrize(
    ("vocab", "rows_of_budget", "columns"),
    [
        (1000, 0, 256),  # the fewest, whatever the budget
        (100, 0, 100),
        (1000, 300, 256),
        (1000, 319, 256),  # a multiple of 64
        (1000, 320, 320),
        (1000, 999, 960),
        (1000, 1000, 1000),  # the whole vocabulary is no slice
        (1000, 1001, 1000),
    ],
)
def test_columns_of_a_streaming_slice(vocab, rows_of_budget, columns):
    sizes = replace(SIZES, vocab=vocab)
    plan = streaming_plan(70, sizes, 70 * sizes.row + rows_of_budget * 70 * 8, "for this test")
    assert plan.columns == columns
    assert plan.bytes == 70 * (sizes.row + columns * 8)


@pytest.mark.parametrize("sizes", [SIZES, LOW_PRECISION], ids=["float32", "bfloat16"])
def test_a_budget_of_exactly_all_rows_takes_them_at_once(sizes):
    plan = make_plan([20, 30, 25, 5], sizes, 80 * sizes.whole_row)
    assert plan.chunks == (WholePairs(0, 4),)
    assert plan.reason == "all 80 rows fit the budget at once"
    assert (plan.rows, plan.dz_rows, plan.sums_weight, plan.bytes) == (80, 80, False, 80 * sizes.whole_row)
    assert make_plan([20, 30, 25, 5], sizes, 80 * sizes.whole_row - 1).reason != plan.reason


@pytest.mark.usefixtures("large_calls")
def test_bytes_of_chunks_of_whole_pairs_by_hand():
    """Beside the logits of one chunk: the dz of all rows, or the half of dW's float32 sum that dW has no room for."""
    weight_sum = 500 * 64 * 4
    kept = make_plan([30] * 2, LOW_PRECISION, 60 * LOW_PRECISION.dz_row + 30 * LOW_PRECISION.row_without_dz)
    assert (kept.chunks, kept.rows, kept.dz_rows) == ((WholePairs(0, 1), WholePairs(1, 2)), 30, 60)
    assert kept.bytes == kept.budget == 60 * 1000 * 2 + 30 * LOW_PRECISION.row_without_dz
    summed = make_plan([30] * 10, LOW_PRECISION, weight_sum + 60 * LOW_PRECISION.whole_row)
    assert (len(summed.chunks), summed.rows, summed.sums_weight, summed.dz_rows) == (10, 30, True, 150)
    assert summed.bytes == weight_sum + 30 * LOW_PRECISION.row_without_dz + 150 * LOW_PRECISION.dz_row <= summed.budget
    frozen = make_plan([30] * 10, replace(LOW_PRECISION, needs_weight_grad=False), 60 * LOW_PRECISION.whole_row)
    assert (len(frozen.chunks), frozen.bytes) == (5, 60 * LOW_PRECISION.whole_row)


@pytest.mark.usefixtures("large_calls")
def test_pairs_shorter_than_a_block_can_be_deferred():
    """Pairs of 40 rows, and logits of 45: whole pairs fit, but not beside the float32 sum of dW."""
    budget = 45 * LOW_PRECISION.whole_row
    plan = make_plan([40] * 3, LOW_PRECISION, budget, can_defer=True)
    assert isinstance(plan, ChunkedPlan)
    assert plan.chunks == tuple(WholePairs(pair, pair + 1) for pair in range(3))
    assert isinstance(make_plan([40] * 3, LOW_PRECISION, budget), StreamingPlan)
    # Blocks of a longer pair have 64 rows or more.
    assert isinstance(make_plan([200], SIZES, 63 * SIZES.whole_row, can_defer=True), StreamingPlan)
    assert isinstance(make_plan([200], SIZES, 64 * SIZES.whole_row, can_defer=True), ChunkedPlan)


@pytest.mark.usefixtures("large_calls")
def test_a_low_precision_pair_whose_dz_is_kept_whole_takes_one_product():
    """There is room for the dz of 2 x width rows where dW is not summed beside."""
    plan = make_plan([128], LOW_PRECISION, 64 * LOW_PRECISION.row_without_dz, can_defer=True)
    assert isinstance(plan, ChunkedPlan)
    assert plan.dz_rows == 128
    assert plan.steps.gradient_products == 1
    assert not plan.sums_weight


def test_the_fastest_plan_is_taken_whatever_its_memory():
    """Kept dz saves products for dW."""
    sizes = replace(LOW_PRECISION, width=400)
    near = make_plan([311, 116, 222], sizes, 365 * sizes.whole_row, can_defer=True)
    assert (near.bytes, near.keeps_dz) == (4_629_328, True)
    sizes = replace(SIZES, width=256)
    apart = make_plan([300], sizes, 120 * sizes.whole_row, can_defer=True)
    assert (apart.bytes, apart.keeps_dz) == (1_843_200, True)


def test_streaming_bytes_by_hand():
    sizes = Sizes(vocab=50_000, width=64, ref_width=64, weight_bytes=2, logit_bytes=4, needs_weight_grad=True)
    plan = streaming_plan(10_000, sizes, 256 << 20, "for this test")
    assert plan.rows == 4096
    assert plan.columns % 64 == 0
    expected = 4096 * sizes.row + 10_000 * 64 * 4 + plan.columns * (4096 * 10 + 64 * 4)
    assert plan.bytes == expected <= 256 << 20
    assert plan.bytes + 64 * (4096 * 10 + 64 * 4) > 256 << 20  # the widest that fits


def test_rows_of_logits_are_padded():
    assert [row_pitch(columns) for columns in (5, 1023, 1024, 50_257, 128_256, 128_257)] == [
        5,
        1023,
        1024,
        50_304,
        128_256,
        128_320,
    ]


GIB = 1 << 30


@pytest.mark.parametrize(
    ("memory", "budget"), [(8 * GIB, 8 * GIB // 12), (24 * GIB, 2 * GIB), (80 * GIB, 5 * GIB), (2 * GIB, GIB // 4)]
)
def test_the_default_budget_follows_a_device_s_total_memory(memory, budget):
    assert cuda_budget(memory) == budget


def test_the_constants_are_those_that_were_measured():
    results = json.loads((ROOT / "benchmarks/results/bench_rates.json").read_text())["results"]
    for measured in results:
        low_precision = measured["dtype"] == "bfloat16"
        rates = RATES["cpu", low_precision]
        assert rates.products == pytest.approx(measured["products"], rel=0.05)
        assert rates.weights == pytest.approx(measured["weights"], rel=0.05)
        if low_precision:
            assert rates.memory == pytest.approx(measured["memory"], rel=0.1)


def test_bytes_of_deferred_plans_by_hand():
    """V 151,936, D 512, bfloat16, 256 MiB: the plans of benchmarks/bench_long_pairs.py."""
    sizes, budget = replace(llm_sizes(151_936, width=512), dz_in_place=True), 256 << 20
    weight, logits = 151_936 * 512 * 4, 151_936 * 8 + sizes.row
    # Each pair's dz is kept, 2 bytes an entry; half of the sum of dW has no room in dW's own memory.
    short = make_plan([512] * 4, sizes, budget, can_defer=True)
    assert (short.rows, short.dz_rows, short.sums_weight, short.weight_apart) == (171, 512, True, False)
    assert short.bytes == 171 * logits + 512 * 151_936 * 2 + weight // 2 <= budget + weight
    # dz of a longer pair would take more than its dW, which is summed apart from that of the other: from the dz of four
    # blocks at a time, which have room within the budget.
    long = make_plan([2048] * 2, sizes, budget, can_defer=True)
    assert (long.rows, long.dz_rows, long.sums_weight, long.weight_apart) == (108, 432, True, True)
    assert long.bytes == 108 * logits + 432 * 151_936 * 2 + weight // 2 + weight <= budget + weight // 2 + weight
    # A single pair's dW is the call's.
    single = make_plan([8192], sizes, budget, can_defer=True)
    assert single.sums_weight
    assert not single.weight_apart
    assert single.bytes <= budget + weight
    # Nothing is summed for a frozen head.
    frozen = make_plan([2048] * 2, replace(sizes, needs_weight_grad=False), budget, can_defer=True)
    assert not frozen.sums_weight
    assert not frozen.weight_apart
    assert frozen.bytes <= budget
    assert "streaming would take" in str(short)


@pytest.mark.parametrize(
    ("pair_rows", "pairs", "vocab", "most_chunks"),
    [
        (1024, 4, 128_256, 1),  # 4,096 rows
        (256, 16, 128_256, 1),
        (1024, 8, 128_256, 3),  # 8,192 rows
        (1024, 4, 151_936, 2),
        (2048, 8, 128_256, 8),  # 16,384 rows
    ],
)
def test_the_usual_batches_stay_chunked_on_80_gb(pair_rows, pairs, vocab, most_chunks):
    plan = make_plan([pair_rows] * pairs, llm_sizes(vocab), cuda_budget(80 * GIB), can_defer=True, device_type="cuda")
    assert isinstance(plan, ChunkedPlan)
    assert not plan.deferred
    assert len(plan.chunks) <= most_chunks
    assert plan.bytes <= 6 * GIB


def test_long_pairs_defer_on_80_gb():
    plan = make_plan([16_384], llm_sizes(128_256), cuda_budget(80 * GIB), can_defer=True, device_type="cuda")
    assert isinstance(plan, ChunkedPlan)
    assert plan.deferred


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


def test_scratch_comes_from_the_smallest_block_of_at_most_twice_the_size():
    def address_of(mebibytes):
        return memory.empty((mebibytes << 20,), torch.uint8, torch.device("cpu")).data_ptr()

    tdpo_ext.release_scratch()
    held = [memory.empty((mebibytes << 20,), torch.uint8, torch.device("cpu")) for mebibytes in (48, 40, 64)]
    large, small, largest = (block.data_ptr() for block in held)
    del held
    assert address_of(38) == small
    assert address_of(24) == small
    assert address_of(41) == large
    assert address_of(32) == small
    assert address_of(19) not in (large, small, largest)
    tdpo_ext.release_scratch()
