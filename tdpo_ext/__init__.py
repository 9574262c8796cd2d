"""Exact, memory-efficient Token-level Direct Preference Optimization (TDPO, arXiv 2404.11999)."""

from . import ops, reference
from .divergence import TokenDivergence, shift_labels, token_divergence
from .info import build_info
from .linear import LinearTDPOLoss, linear_preference_loss, linear_token_divergence
from .losses import dpo_loss, rewards, tdpo_loss
from .ops import release_scratch
from .plan import Plan, make_plan
from .shard import VocabShard

__all__ = [
    "LinearTDPOLoss",
    "Plan",
    "TokenDivergence",
    "VocabShard",
    "build_info",
    "dpo_loss",
    "linear_preference_loss",
    "linear_token_divergence",
    "make_plan",
    "ops",
    "reference",
    "release_scratch",
    "rewards",
    "shift_labels",
    "tdpo_loss",
    "token_divergence",
]
__version__ = build_info()["version"]
