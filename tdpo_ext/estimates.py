"""What a fused loss will need before it is called: its plan, and bytes beside those of others. Reads no tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import checks
from .fused.planning.choose import make_plan
from .fused.planning.plan import ChunkedPlan, StreamingPlan, check_budget, cuda_budget, default_budget
from .fused.planning.sizes import Sizes
from .ops.operators import state_dtype

# TRL 1.16's kernels take so many rows and vocabulary entries at a time (trl/kernels/chunked_logprob.py).
_TRL_ROWS, _TRL_COLUMNS = 4096, 32768
# Tensors of the logits' shape that the published code holds at its peak: both models' logits and log-probabilities, the
# reference's probabilities, the difference of the log-probabilities, and its product with the probabilities.
_PUBLISHED_TENSORS = 7
_FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Estimate:
    """Bytes of one call of a fused loss, beyond its arguments, and those of the same step elsewhere.

    Attributes:
        plan: the plan that the call makes; `str(plan)` says which and why.
        gradients: of the gradients that it returns: of the hidden states of the rows and, unless frozen, of the head.
        published: temporaries of the code published with TDPO (arXiv 2404.11999), which materialises logits: seven
            float32 tensors of (positions, vocab).
        trl: temporaries of TRL 1.16's DPOTrainer on a GPU, whose loss, DPO, needs no KL: a tile of at most 4,096 rows
            and 32,768 entries in the weights' precision and, where that is low, float32 sums of both gradients.
    """

    plan: ChunkedPlan | StreamingPlan
    gradients: int
    published: int
    trl: int

    @property
    def temporaries(self) -> int:
        """Bytes of logits and other temporaries, freed when the loss is known."""
        return self.plan.bytes


def estimate(
    pair_lengths: Sequence[int],
    *,
    vocab: int,
    width: int,
    ref_width: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    frozen_head: bool = False,
    margin_loss: bool = True,
    logits_budget: int | None = None,
    device_type: str = "cpu",
    device_memory: int | None = None,
    positions: int | None = None,
) -> Estimate:
    """The plan and the bytes of `linear_preference_loss` for pairs of `pair_lengths` rows, without calling it.

    For `linear_token_loss`, the lengths are those of the sequences.

    Args:
        pair_lengths: response tokens of each pair, of both responses together.
        vocab, width: of the policy's head, whose weight is (vocab, width); of a shard, what one rank holds.
        ref_width: of the reference's hidden states (default: `width`); 0 where there is no reference.
        dtype: of the policy's hidden states and head as the loss gets them.
        frozen_head: the head's weight needs no gradient.
        margin_loss: the objective is a `MarginLoss`, as `tdpo_loss` and `dpo_loss` are.
        logits_budget: bytes, as the loss takes it.
        device_type: "cpu" or "cuda".
        device_memory: bytes of a CUDA device, which its default budget follows (default: this machine's).
        positions: of both models' logits in code that materialises them, prompts and padding included (default: the
            rows).

    Raises:
        TypeError, ValueError: an argument of the wrong type or range, named in the message.
    """
    lengths = [checks.integer("pair_lengths", length, least=0) for length in pair_lengths]
    if not any(lengths):
        raise ValueError(f"pair_lengths is {checks.describe(pair_lengths)}; rows are needed")
    if dtype not in checks.FLOATS:
        raise TypeError(f"dtype is {checks.describe(dtype)}; allowed are {', '.join(map(str, checks.FLOATS))}")
    sizes = Sizes(
        vocab=checks.integer("vocab", vocab, least=1),
        width=checks.integer("width", width, least=1),
        ref_width=width if ref_width is None else checks.integer("ref_width", ref_width, least=0),
        weight_bytes=dtype.itemsize,
        logit_bytes=state_dtype(dtype).itemsize,
        needs_weight_grad=not frozen_head,
        is_half=dtype == torch.float16,
        dz_in_place=device_type == "cpu",
    )
    rows = sum(lengths)
    budget = _budget(logits_budget, device_type, device_memory)
    placed = rows if positions is None else checks.integer("positions", positions, least=rows)
    weight_entries = 0 if frozen_head else sizes.vocab * sizes.width
    return Estimate(
        plan=make_plan(
            lengths, sizes, budget, can_defer=margin_loss, can_separate=frozen_head, device_type=device_type
        ),
        gradients=(rows * sizes.width + weight_entries) * sizes.weight_bytes,
        published=_PUBLISHED_TENSORS * placed * sizes.vocab * _FLOAT32,
        trl=_trl_bytes(rows, sizes, weight_entries),
    )


def _trl_bytes(rows: int, sizes: Sizes, weight_entries: int) -> int:
    tile = min(rows, _TRL_ROWS) * _TRL_COLUMNS * sizes.weight_bytes
    sums = rows * sizes.width + weight_entries if sizes.low_precision else 0  # otherwise they are the gradients
    return tile + sums * _FLOAT32


def _budget(logits_budget: int | None, device_type: str, device_memory: int | None) -> int:
    checks.choice("device_type", device_type, ("cpu", "cuda"))
    if device_memory is not None and device_type != "cuda":
        raise ValueError(f"device_memory is {device_memory}, but device_type is {device_type!r}: only a GPU's matters")
    total = None if device_memory is None else checks.integer("device_memory", device_memory, least=1)
    if logits_budget is not None:
        return check_budget(logits_budget)
    if total is not None:
        return cuda_budget(total)
    if device_type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device_memory is None, but this machine has no GPU: give the memory of the one that is meant")
    return default_budget(torch.device(device_type))
