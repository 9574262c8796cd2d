"""Exact, memory-efficient Token-level Direct Preference Optimization (TDPO, arXiv 2404.11999)."""

from . import eager, ops
from .divergence import TokenDivergence, shift_labels, token_divergence
from .fused.plan import ChunkedPlan, StreamingPlan, make_plan
from .info import build_info
from .linear import LinearTDPOLoss, linear_preference_loss, linear_token_divergence
from .losses import dpo_loss, rewards, tdpo_loss
from .ops.memory import release_scratch
from .vocab_parallel import VocabShard

__all__ = [
    "ChunkedPlan",
    "LinearTDPOLoss",
    "StreamingPlan",
    "TokenDivergence",
    "VocabShard",
    "build_info",
    "dpo_loss",
    "eager",
    "linear_preference_loss",
    "linear_token_divergence",
    "make_plan",
    "ops",
    "release_scratch",
    "rewards",
    "shift_labels",
    "tdpo_loss",
    "token_divergence",
]
__version__ = build_info()["version"]
