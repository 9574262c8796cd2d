"""Hidden states on disk as the reference: of the model only the head stays in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from ..models.causal_lm import CausalLM
from .cache import ReferenceCache
from .reference import Read, Reference


class _HeadAlone(nn.Module):
    """A copy of a model's head, so that the model can be freed or trained."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config, self.head = model.config, copy.deepcopy(model.get_output_embeddings())
        self.eval()

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@dataclass(frozen=True)
class CachedStates(Reference):
    """The caches of tokenized datasets, and a head: nothing that could be run."""

    caches: list[tuple[Dataset, ReferenceCache]] = field(default_factory=list)

    @classmethod
    def beside(cls, model: CausalLM, caches: list[tuple[Dataset, ReferenceCache]]) -> CachedStates:
        """What stays in memory of a model whose hidden states are cached."""
        return cls(**{**vars(model), "model": _HeadAlone(model.model), "probed": None}, caches=caches)

    def stored_hidden(self, dataset: Dataset | None) -> Callable[[int, str], Tensor]:
        """What reads the hidden states of a dataset's rows, for a `PreferenceCollator`.

        Raises:
            ValueError: this dataset has no cache.
        """
        for cached, cache in self.caches:
            if cached is dataset:
                return cache.hidden
        raise ValueError("precompute_reference: this dataset was not given to the trainer, so it has no cache")

    def rows(self, batch: dict[str, Any], read: Read = CausalLM.hidden_rows) -> Tensor:
        """The head's inputs for the hidden states that the collator has read from a cache, (R, D).

        Raises:
            ValueError: something else than hidden states is asked for.
        """
        if read is not CausalLM.hidden_rows:
            raise ValueError("a reference cache holds hidden states alone")
        with torch.no_grad():
            return self.head.inputs(batch["ref_hidden"])
