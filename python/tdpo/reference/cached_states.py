"""Hidden states on disk as the reference: of the model only the head stays in memory."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from ..models.causal_lm import CausalLM
from .cache import ReferenceCache
from .reference import Head, Read


@dataclass(frozen=True)
class CachedStates:
    """The caches of all splits, by name, and a copy of the head; the attributes are those of `Reference`."""

    caches: dict[str, ReferenceCache]
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    fallback_reason: str | None

    @classmethod
    def of(cls, model: CausalLM, caches: dict[str, ReferenceCache]) -> CachedStates:
        """With a copy of the model's head, so that the model can be freed or trained."""
        return cls(
            caches=caches,
            weight=model.weight.detach().clone(),
            bias=None if model.bias is None else model.bias.detach().clone(),
            softcap=model.softcap,
            logit_scale=model.logit_scale,
            fallback_reason=model.fallback_reason,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.weight)

    def rows(self, batch: dict[str, Tensor], read: Read = CausalLM.hidden_rows) -> Tensor:
        """The hidden states that the collator has read from a cache, (R, D).

        Raises:
            ValueError: something else than hidden states is asked for.
        """
        if read is not CausalLM.hidden_rows:
            raise ValueError("a reference cache holds hidden states alone")
        return batch["ref_hidden"]

    def whole_head(self) -> AbstractContextManager[Head]:
        return nullcontext((self.weight, self.bias))
