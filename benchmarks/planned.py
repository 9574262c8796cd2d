"""The plan that a fused loss makes for a step of the benchmarks."""

from __future__ import annotations

import torch

from tdpo_ext.fused.planning.choose import make_plan
from tdpo_ext.fused.planning.plan import ChunkedPlan, StreamingPlan
from tdpo_ext.fused.planning.sizes import Sizes


def step_sizes(vocab: int, width: int, dtype: torch.dtype) -> Sizes:
    """Of a head that trains; logits are float32."""
    return Sizes(vocab, width, width, weight_bytes=dtype.itemsize, logit_bytes=4, needs_weight_grad=True)


def step_plan(pairs: int, pair_rows: int, sizes: Sizes, budget: int, device_type: str) -> ChunkedPlan | StreamingPlan:
    """For TDPO of pairs of equal length."""
    return make_plan([pair_rows] * pairs, sizes, budget, can_defer=True, device_type=device_type)
