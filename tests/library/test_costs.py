"""The planner's cost model, by hand."""

from dataclasses import replace

import pytest

from tdpo_ext.fused.planning.costs import (
    RATES,
    ForwardSteps,
    MachineRates,
    Work,
    forward_work,
    rates_of,
    streaming_work,
)
from tdpo_ext.fused.planning.sizes import Sizes

ROWS = 7
TRAINED = Sizes(vocab=10, width=4, ref_width=6, weight_bytes=2, logit_bytes=4, needs_weight_grad=True)
FROZEN = replace(TRAINED, needs_weight_grad=False)
WITHOUT = replace(FROZEN, needs_grad=False)


@pytest.mark.parametrize(
    ("sizes", "work"),
    [
        # Both heads, 200 bytes, are read in 3 blocks, the policy's, 80, in 2 products for dhidden; a dW has 160.
        (TRAINED, Work(products=700 + 280 + 280, weights=600 + 160, moved=(2 * 2 - 1 + 3 * 1 + 2) * 160)),
        (FROZEN, Work(products=700 + 280, weights=600 + 160, moved=0)),
        (WITHOUT, Work(products=700, weights=600, moved=0)),
    ],
)
def test_work_of_forward_plans(sizes, work):
    assert forward_work(sizes, ROWS, ForwardSteps(blocks=3, gradient_products=2, pairs_apart=1)) == work


@pytest.mark.parametrize(
    ("sizes", "work"),
    [
        # Logits of the policy and of half of the reference a second time, and dhidden; those logits are written and
        # read, and so are 5 sums of dhidden.
        (TRAINED, Work(products=700 + 770 + 280, weights=600 + 660, moved=840 + 1120 + 960)),
        (FROZEN, Work(products=700 + 770, weights=600 + 660, moved=840 + 1120)),
        (WITHOUT, Work(products=700, weights=600, moved=0)),
    ],
)
def test_work_of_streaming_plans(sizes, work):
    assert streaming_work(sizes, ROWS, blocks=3, slices=5) == work


def test_seconds_are_those_of_each_part():
    assert Work(products=6, weights=20, moved=9).seconds(MachineRates(products=2, weights=5, memory=3)) == 10


def test_unknown_devices_have_the_rates_of_a_gpu():
    single = replace(TRAINED, weight_bytes=4)
    assert rates_of("cpu", TRAINED) is RATES["cpu", True]
    assert rates_of("cpu", single) is RATES["cpu", False]
    assert rates_of("xpu", TRAINED) is RATES["cuda", True]
    assert rates_of("xpu", single) is RATES["cuda", False]
