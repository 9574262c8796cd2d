"""Exact, memory-efficient Token-level Direct Preference Optimization (TDPO, arXiv 2404.11999)."""

from . import eager, ops
from .divergence import TokenDivergence, TokenRows, shift_labels, token_divergence
from .estimates import Estimate, estimate
from .fused.planning.choose import make_plan
from .fused.planning.plan import ChunkedPlan, StreamingPlan
from .fused.planning.sizes import Sizes
from .info import build_info
from .linear import linear_logps, linear_preference_loss, linear_token_divergence, linear_token_loss
from .loss_module import LinearTDPOLoss
from .losses import MarginLoss, dpo_loss, per_token, reference_free, rewards, tdpo_loss
from .ops.memory import release_scratch
from .vocab_parallel import VocabShard

__all__ = [
    "ChunkedPlan",
    "Estimate",
    "LinearTDPOLoss",
    "MarginLoss",
    "Sizes",
    "StreamingPlan",
    "TokenDivergence",
    "TokenRows",
    "VocabShard",
    "build_info",
    "dpo_loss",
    "eager",
    "estimate",
    "linear_logps",
    "linear_preference_loss",
    "linear_token_divergence",
    "linear_token_loss",
    "make_plan",
    "ops",
    "per_token",
    "reference_free",
    "release_scratch",
    "rewards",
    "shift_labels",
    "tdpo_loss",
    "token_divergence",
]
__version__: str = ops.operators.compiled.build_info()["version"]
