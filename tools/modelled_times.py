"""Prints the time that plans take beside their products, by the planner's model: `python tools/modelled_times.py`."""

from __future__ import annotations

from tdpo_ext.fused.planning.choose import make_plan
from tdpo_ext.fused.planning.costs import RATES, forward_work
from tdpo_ext.fused.planning.plan import ChunkedPlan, cuda_budget
from tdpo_ext.fused.planning.sizes import Sizes

WIDTH, PAIR_ROWS, MEMORY = 4096, 1024, 80 << 30
SHAPES = [(4096, 128_256), (8192, 128_256), (8192, 151_936), (16_384, 128_256), (8192, 262_144)]


def main() -> None:
    rates = RATES["cuda", True]
    print("| rows | V | rows at a time | dz kept of | temporaries | time over that of the products |")
    print("|---|---|---|---|---|---|")
    for rows, vocab in SHAPES:
        sizes = Sizes(vocab, WIDTH, WIDTH, weight_bytes=2, logit_bytes=4, needs_weight_grad=True)
        lengths = [PAIR_ROWS] * (rows // PAIR_ROWS)
        plan = make_plan(lengths, sizes, cuda_budget(MEMORY), can_defer=True, device_type="cuda")
        assert isinstance(plan, ChunkedPlan)
        products = 4 * rows * vocab * WIDTH / rates.products
        ratio = forward_work(sizes, rows, plan.steps).seconds(rates) / products
        size = f"{plan.bytes / 2**30:.1f} GiB"
        print(f"| {rows:,} | {vocab:,} | {plan.rows:,} | {plan.dz_rows:,} | {size} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
