"""The budget of bytes for logits and other temporaries, and the plans that keep it (`choose.make_plan`)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ... import checks
from .costs import ForwardSteps


def default_budget(device: torch.device) -> int:
    """Bytes for temporaries where the caller gives no budget.

    A twelfth of a CUDA device's memory, between 256 MiB and 5 GiB; 512 MiB elsewhere. With 5 GiB, 4,096 rows of a
    128,256-entry vocabulary are one chunk.
    """
    if device.type == "cuda":
        return cuda_budget(torch.cuda.get_device_properties(device).total_memory)
    return 512 << 20


def cuda_budget(total_memory: int) -> int:
    """The default budget of a CUDA device with this many bytes."""
    return min(max(total_memory // 12, 256 << 20), 5 << 30)


def resolved_budget(budget: int | None, device: torch.device) -> int:
    """The caller's budget, checked, or the default.

    Raises:
        TypeError, ValueError: `budget` is given and no positive integer.
    """
    return default_budget(device) if budget is None else check_budget(budget)


def check_budget(budget: int) -> int:
    """`budget`, once it is known to be a positive integer."""
    return checks.integer("logits_budget", budget, least=1)


@dataclass(frozen=True)
class WholePairs:
    """Consecutive pairs, `first` to `stop`, whose logits are there together: their gradients are formed at once."""

    first: int
    stop: int

    @property
    def pairs(self) -> range:
        return range(self.first, self.stop)


@dataclass(frozen=True)
class LongPair:
    """One pair, taken a block of rows at a time: its gradients wait for what its loss alone knows."""

    pair: int

    @property
    def pairs(self) -> range:
        return range(self.pair, self.pair + 1)


@dataclass(frozen=True)
class ChunkedPlan:
    """Pairs in chunks whose gradients are formed in the forward pass: four matrix products, no recompute.

    A chunk of whole pairs that fits the budget is taken at once ("chunked"). A pair that does not is a chunk alone,
    taken `rows` rows at a time, with gradients that lack a factor until its loss is known ("deferred"): its dz is kept
    until then where that takes no more memory than its dW; else its dW is summed apart. Where the head is frozen, the
    dhidden of a pair under any objective is kept in two parts instead ("separated"), which takes a fourth product.

    Attributes:
        chunks: all pairs, in order.
        rows: rows of logits at a time, at most; a chunk of whole pairs has no more.
        dz_rows: rows whose dz is kept, at most, until dhidden and dW are formed from all of them at once.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that the plan needs. For a `MarginLoss`, where it saves the recompute, these may be
            beyond the budget: see `make_plan`.
        reason: human-readable reason for this plan.
        steps: how often it takes its products, for the cost model.
        sums_weight: a low-precision dW is added to more than once, and so summed in float32.
        weight_apart: the dW of a long pair is summed apart from that of the other pairs.
        separates: of long pairs, dhidden is kept in two parts until the loss is known (`long_pairs`).
    """

    chunks: tuple[WholePairs | LongPair, ...]
    rows: int
    dz_rows: int
    budget: int
    bytes: int
    reason: str
    steps: ForwardSteps
    sums_weight: bool = False
    weight_apart: bool = False
    separates: bool = False

    @property
    def deferred(self) -> bool:
        """Whether some pair is taken in several blocks of rows."""
        return any(isinstance(chunk, LongPair) for chunk in self.chunks)

    @property
    def keeps_dz(self) -> bool:
        """Whether dz of more rows is kept than there are logits of."""
        return self.dz_rows > self.rows

    def __str__(self) -> str:
        return f"{'deferred' if self.deferred else 'chunked'}: {self.reason}"


@dataclass(frozen=True)
class StreamingPlan:
    """Slices of the vocabulary whose row states are merged; logits are recomputed for the gradients.

    Attributes:
        rows: rows of a block, at most.
        columns: vocabulary entries of a slice, at most.
        budget: bytes of temporaries that were allowed.
        bytes: bytes of temporaries that the plan needs.
        reason: human-readable reason for this plan.
    """

    rows: int
    columns: int
    budget: int
    bytes: int
    reason: str

    def __str__(self) -> str:
        return f"streaming: {self.reason}"
