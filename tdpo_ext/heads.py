"""The two LM heads and the hidden states they read: checks, casts, and the products that make logits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import ops
from .matmul import product
from .plan import Costs
from .shard import VocabShard


@dataclass(frozen=True)
class Options:
    """What the operators want to know beside the tensors; softcap 0 means none.

    The heads' rows are entries vocab_start and following of a vocabulary of vocab_size; `shard` says how it is shared.
    """

    ignore_index: int
    temperature: float
    softcap: float
    vocab_start: int
    vocab_size: int
    shard: VocabShard | None = None

    @property
    def hidden_grad_shard(self) -> VocabShard | None:
        """The shard over whose ranks dhidden is summed, if it is."""
        return self.shard if self.shard is not None and self.shard.sum_hidden_grad else None

    def slice_from(self, first: int) -> tuple[int, int, int, float, float]:
        """The operators' last arguments for a slice that begins at the heads' row `first`."""
        return self.vocab_start + first, self.vocab_size, self.ignore_index, self.temperature, self.softcap


@dataclass(frozen=True)
class Heads:
    """hidden (..., D), weight (V, D), bias (V,) or None; the same of the reference, of width D_ref; labels (...)."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    ref_hidden: Tensor
    ref_weight: Tensor
    ref_bias: Tensor | None
    labels: Tensor

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    def autocast(self) -> Heads:
        """The casts of `torch.nn.functional.linear` under autocast; unchanged without."""
        kind = self.hidden.device.type
        if not torch.is_autocast_enabled(kind):
            return self
        dtype = torch.get_autocast_dtype(kind)

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        names = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
        return replace(self, **{name: cast(getattr(self, name)) for name in names})

    def check(self) -> Heads:
        """Self, once every shape, dtype and device fits.

        Raises:
            ValueError, TypeError: the first that doesn't, named in the message.
        """
        labels = self.labels
        expected = {
            "hidden": (*labels.shape, self.hidden.shape[-1] if self.hidden.dim() else 1),
            "weight": (self.weight.shape[0] if self.weight.dim() else 1, *self.hidden.shape[-1:]),
            "ref_hidden": (*labels.shape, self.ref_hidden.shape[-1] if self.ref_hidden.dim() else 1),
            "ref_weight": (*self.weight.shape[:1], *self.ref_hidden.shape[-1:]),
            "bias": (*self.weight.shape[:1],),
            "ref_bias": (*self.weight.shape[:1],),
        }
        for name, shape in expected.items():
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)} but {shape} is needed")
            if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
                raise TypeError(f"{name} has dtype {tensor.dtype}; allowed are float32, bfloat16, float16 and float64")
            if tensor.dtype != self.hidden.dtype:
                raise TypeError(f"{name} has dtype {tensor.dtype} but hidden has {self.hidden.dtype}")
            if tensor.device != self.hidden.device:
                raise ValueError(f"{name} is on {tensor.device} but hidden is on {self.hidden.device}")
        if labels.dtype != torch.int64:
            raise TypeError(f"labels has dtype {labels.dtype} but torch.int64 is needed")
        if labels.device != self.hidden.device:
            raise ValueError(f"labels is on {labels.device} but hidden is on {self.hidden.device}")
        return self

    def flat(self) -> Heads:
        """With rows in one dimension: hidden (N, D), ref_hidden (N, D_ref), labels (N,)."""
        return replace(
            self,
            hidden=self.hidden.reshape(-1, self.hidden.shape[-1]),
            ref_hidden=self.ref_hidden.detach().reshape(-1, self.ref_hidden.shape[-1]),
            ref_weight=self.ref_weight.detach(),
            ref_bias=None if self.ref_bias is None else self.ref_bias.detach(),
            labels=self.labels.reshape(-1),
        )

    @property
    def logit_dtype(self) -> torch.dtype:
        return ops.state_dtype(self.hidden.dtype)

    def costs(self, vocab: int) -> Costs:
        """The sizes that the planner wants, for `vocab` entries of the vocabulary."""
        grad = torch.is_grad_enabled()
        return Costs(
            vocab=vocab,
            width=self.weight.shape[1],
            ref_width=self.ref_weight.shape[1],
            element=self.weight.dtype.itemsize,
            logit=self.logit_dtype.itemsize,
            needs_weight_grad=grad and self.weight.requires_grad,
            needs_grad=grad,
        )


def logits_into(
    out: Tensor,  # (n, columns)
    hidden: Tensor,  # (n, D)
    weight: Tensor,  # (V, D)
    bias: Tensor | None,
    first: int = 0,
) -> Tensor:
    """Logits of vocabulary entries first to first + columns, in the precision of `out`."""
    last = first + out.shape[1]
    product(hidden, weight[first:last].t(), out)
    if bias is not None:
        out += bias[first:last]
    return out
