"""The planner's choice by its cost model: the fastest plan, and never a slower one for more budget."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from helpers.planning import llm_sizes
from tdpo_ext.fused.planning.choose import _streaming_seconds, make_plan
from tdpo_ext.fused.planning.costs import RATES, forward_work, rates_of
from tdpo_ext.fused.planning.plan import StreamingPlan, cuda_budget
from tdpo_ext.fused.planning.sizes import Sizes

GIB = 1 << 30
ROOT = Path(__file__).parents[2]


def test_a_slower_deferred_plan_is_not_chosen():
    """64 rows at a time on a GPU: every block's sum of dW costs more than computing logits twice."""
    sizes = llm_sizes(151_936)
    budget = 64 * sizes.whole_row
    plan = make_plan([16_384] * 2, sizes, budget, can_defer=True, device_type="cuda")
    assert isinstance(plan, StreamingPlan)
    assert "forward gradients would take" in str(plan)


def test_the_planner_compares_costs():
    sizes = Sizes(vocab=50_257, width=768, ref_width=768, weight_bytes=4, logit_bytes=4, needs_weight_grad=True)
    budget = 64 << 20
    assert make_plan([2048], sizes, budget, can_defer=True).deferred
    assert isinstance(make_plan([2048], sizes, budget), StreamingPlan)
    # On a GPU, products are so fast that adding up a dW for every short pair costs more than the recompute.
    many_short = make_plan([256] * 64, sizes, budget, can_defer=True, device_type="cuda")
    assert isinstance(many_short, StreamingPlan)
    assert make_plan([8192], sizes, 1 << 30, can_defer=True, device_type="cuda").deferred


@pytest.mark.parametrize("pair_rows", [48, 128, 200])
def test_streaming_is_not_chosen_beyond_the_budget_where_whole_pairs_fit(pair_rows):
    """Its fewest rows and columns need three times the budget here; by the model it would be faster."""
    sizes = Sizes(vocab=32_000, width=4096, ref_width=4096, weight_bytes=4, logit_bytes=4, needs_weight_grad=True)
    plan = make_plan([pair_rows] * 64, sizes, 64 << 20, device_type="cuda")
    assert not isinstance(plan, StreamingPlan)
    assert plan.bytes <= plan.budget


def modelled(plan, rows, sizes, device_type):
    rates = rates_of(device_type, sizes)
    if isinstance(plan, StreamingPlan):
        return _streaming_seconds(plan, rows, sizes, rates)
    return forward_work(sizes, rows, plan.steps).seconds(rates)


def test_more_budget_never_makes_a_slower_plan():
    """Of any batch, by the model; from a hundredth of all logits to all of them, in steps of a few percent."""
    draw, kinds = random.Random(0), Counter()
    for _ in range(150):
        sizes = Sizes(
            vocab=draw.choice([1000, 32_000, 128_256, 262_144]),
            width=draw.choice([64, 600, 4096]),
            ref_width=draw.choice([64, 4096]),
            weight_bytes=draw.choice([2, 4]),
            logit_bytes=4,
            needs_weight_grad=draw.random() < 0.7,
        )
        longest = draw.choice([20, 400, 4096])
        lengths = [draw.randint(1, longest) for _ in range(draw.randint(1, 12))]
        if draw.random() < 0.3:
            lengths = [longest] * len(lengths)
        can_defer, device_type, rows = draw.random() < 0.6, draw.choice(["cpu", "cuda"]), sum(lengths)
        before = None
        for step in range(70):
            budget = int(rows * sizes.whole_row * 1.07 ** (step - 68))
            plan = make_plan(lengths, sizes, budget, can_defer=can_defer, device_type=device_type)
            seconds = modelled(plan, rows, sizes, device_type)
            if isinstance(plan, StreamingPlan) and plan.bytes > budget:
                continue  # for want of a plan that fits
            assert before is None or seconds <= before, (lengths, sizes, budget, can_defer, device_type)
            before = seconds
            kinds[str(plan).partition(":")[0]] += 1
    assert set(kinds) == {"chunked", "deferred", "streaming"}
    assert min(kinds.values()) > 200


@pytest.mark.parametrize(
    ("pair_rows", "pairs", "vocab", "most"),
    [
        (1024, 4, 128_256, 1.06),
        (1024, 8, 128_256, 1.06),
        (1024, 8, 151_936, 1.08),
        (1024, 16, 128_256, 1.10),
        (1024, 8, 262_144, 1.08),
    ],
)
def test_time_beside_the_products_on_80_gb(pair_rows, pairs, vocab, most):
    """Of TDPO with bfloat16 weights of width 4,096, by the model; docs/performance.md has these."""
    sizes, rows = llm_sizes(vocab), pair_rows * pairs
    plan = make_plan([pair_rows] * pairs, sizes, cuda_budget(80 * GIB), can_defer=True, device_type="cuda")
    products = 4 * rows * vocab * 4096 / RATES["cuda", True].products
    assert modelled(plan, rows, sizes, "cuda") <= most * products


def test_the_predictions_for_gpus_are_the_models(tmp_path):
    """The committed results, and so docs/performance.md, are what the script computes."""
    script = ROOT / "benchmarks" / "modelled_times.py"
    subprocess.run([sys.executable, script, "--output", tmp_path], check=True, stdout=subprocess.DEVNULL)
    computed = json.loads((tmp_path / "modelled_times.json").read_text())
    assert computed == json.loads((ROOT / "benchmarks/results/modelled_times.json").read_text())
