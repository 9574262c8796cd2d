"""Activations: what autograd keeps of a backbone's forward pass, found by running it on tensors without memory."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ..models.causal_lm import unwrap_peft
from ..models.without_weights import FAKE

_LENGTHS = (32, 64, 96)  # of the sequences that the model is tried on: as many as a square has coefficients


@dataclass(frozen=True)
class Activations:
    """Bytes that autograd keeps of sequences of T tokens: `copies`, and for each sequence T * token + T² * square.

    With activation checkpointing, `layers` inputs of `layer_input` bytes a token are kept; the backward pass computes
    the others again, a layer at a time.

    Attributes:
        copies: of weights, in the precision of autocast.
        token, square: whatever grows with T, and with T² (attention that keeps its probabilities).
        layers: of the model.
        layer_input: bytes of a token.
    """

    copies: int
    token: float
    square: float
    layers: int
    layer_input: int

    def forward(self, sequences: int, length: int, *, checkpointed: bool) -> int:
        """When the forward pass of `sequences` of `length` tokens is done, without `copies`."""
        if checkpointed:
            return sequences * length * self.layers * self.layer_input
        return round(sequences * (length * self.token + length**2 * self.square))

    def recomputed(self, sequences: int, length: int, *, checkpointed: bool) -> int:
        """What comes beside in the backward pass: one layer of them, recomputed."""
        return self.forward(sequences, length, checkpointed=False) // self.layers if checkpointed else 0


def activations_of(model: Any, autocast: torch.dtype | None) -> Activations | str:
    """Of a model without weights (`models.without_weights`), or in one sentence why they are not known.

    Args:
        autocast: the precision that it computes in, if not that of its weights.
    """
    causal_lm: Any = unwrap_peft(model)
    try:
        kept = [_kept_bytes(causal_lm, length, autocast) for length in _LENGTHS]
    except Exception as error:  # of any model's code: it may ask for values, which there are none of
        reason = " ".join(str(error).split())[:120]
        return f"its layers can't be run without weights ({type(error).__name__}: {reason})"
    square, token, constant = np.polyfit(_LENGTHS, kept, 2)
    config = causal_lm.config.get_text_config()
    embedding: Any = causal_lm.get_input_embeddings()
    return Activations(
        copies=max(0, round(constant)),
        token=float(token),
        square=max(0.0, float(square)),
        layers=config.num_hidden_layers,
        layer_input=config.hidden_size * embedding.weight.element_size(),
    )


def _kept_bytes(causal_lm: Any, length: int, autocast: torch.dtype | None) -> int:
    """Bytes of the storages that autograd keeps of a sequence, other than those of the parameters."""
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    precision = nullcontext() if autocast is None else torch.autocast("cpu", autocast)
    with FAKE, saved_tensors_hooks(keep, lambda tensor: tensor), precision:
        causal_lm.base_model(input_ids=torch.zeros((1, length), dtype=torch.long), use_cache=False)
    own = {parameter.untyped_storage()._cdata for parameter in causal_lm.parameters()}
    return sum(storage.nbytes() for number, storage in kept.items() if number not in own)
