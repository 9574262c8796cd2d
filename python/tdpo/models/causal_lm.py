"""What the fused loss reads of a causal language model: hidden states of its backbone, weights of its head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .attention_masks import branch_masks
from .sharding import full_tensor, is_sharded, stand_in

if TYPE_CHECKING:
    from typing_extensions import Self

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def unwrap_peft(model: Any) -> PreTrainedModel:
    """The causal language model inside a peft model, its adapters still in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ResponseRows(NamedTuple):
    """What a model gives for the response tokens of a batch.

    Attributes:
        values: the hidden states that predict them, (R, D), or their logits, (R, V).
        router_logits: of a mixture of experts, (B T, experts) of every layer; empty where it gives none.
    """

    values: Tensor
    router_logits: tuple[Tensor, ...]


@dataclass(frozen=True)
class CausalLM:
    """A causal language model as backbone and head.

    Attributes:
        model: the causal language model.
        softcap: the model caps its logits as softcap * tanh(logits / softcap); None if it doesn't.
        logit_scale: the model multiplies its head's output by this before.
        fallback_reason: why this model's head can't be fused, so that logits must be materialised; None if it can.
        probed: the model that is run to find out what it can do, where `model` can't be run outside an engine.
    """

    model: PreTrainedModel
    softcap: float | None
    logit_scale: float
    fallback_reason: str | None
    probed: PreTrainedModel | None = None

    @property
    def probe(self) -> CausalLM:
        """The same model in a form that can be run to find out what it does."""
        return self if self.probed is None else replace(self, model=self.probed, probed=None)

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Inspects a model and, on two tokens, compares its own logits with those formed from its hidden states."""
        model = unwrap_peft(model)
        probed = stand_in(model) if is_sharded(model) else model
        config = model.config.get_text_config()
        softcap, scale = getattr(config, "final_logit_softcapping", None), _logit_scale(config)
        fallback_reason = None
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            fallback_reason = f"its head is {type(head).__name__}, not a linear layer"
        else:
            fallback_reason = cls(probed, softcap, scale, None)._difference_from_logits()
        return cls(model, softcap, scale, fallback_reason, probed)

    def hidden(self, **batch: Tensor) -> Tensor:
        """Last hidden states, (B, T, D), after the final norm."""
        return self.model.base_model(**self._inputs(batch)).last_hidden_state

    def logits(self, **batch: Tensor) -> Tensor:
        """The model's own logits, (B, T, V)."""
        return self.model(**self._inputs(batch)).logits

    def hidden_rows(self, batch: dict[str, Tensor], **options: bool) -> ResponseRows:
        """The hidden states that predict the response tokens of a batch; `options` are the model's."""
        output = self.model.base_model(**self._inputs(batch), **options)
        return _response_rows(output.last_hidden_state, output, batch)

    def logit_rows(self, batch: dict[str, Tensor], **options: bool) -> ResponseRows:
        """The logits of the response tokens of a batch."""
        output = self.model(**self._inputs(batch), **options)
        return _response_rows(output.logits, output, batch)

    def _inputs(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        if "segments" in batch:
            places = {"positions": batch["position_ids"], "segments": batch["segments"]}
            inputs["attention_mask"] = branch_masks(self.model.config, self.weight.dtype, **places)
        return {**inputs, "use_cache": False}

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def weight(self) -> Tensor:  # (V, D)
        return self.model.get_output_embeddings().weight

    @property
    def bias(self) -> Tensor | None:  # (V,)
        return self.model.get_output_embeddings().bias

    @torch.no_grad()
    def _difference_from_logits(self) -> str | None:
        """Why the model's logits are not those formed from its hidden states; None where they are."""
        was_training = self.model.training
        self.model.eval()
        try:
            tokens = torch.tensor([[1, 2]], device=self.weight.device) % self.vocab_size
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            bias = None if self.bias is None else full_tensor(self.bias)
            logits = nn.functional.linear(self.hidden(**batch), full_tensor(self.weight), bias).float()
            logits = logits * self.logit_scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            actual = full_tensor(self.logits(**batch)).float()
        except (AttributeError, TypeError, RuntimeError) as error:
            return f"its backbone or its logits can't be tried on two tokens: {' '.join(str(error).split())}"
        finally:
            self.model.train(was_training)
        spread = actual.std() + torch.finfo(torch.float32).tiny
        if actual.shape == logits.shape and (actual - logits).abs().max() / spread < 0.05:
            return None
        return "its logits are not a linear (scaled, softcapped) function of its last hidden state"


def _response_rows(values: Tensor, output: Any, batch: dict[str, Tensor]) -> ResponseRows:
    return ResponseRows(values.flatten(0, 1)[batch["rows"]], getattr(output, "router_logits", None) or ())


def _logit_scale(config: Any) -> float:
    """What a model multiplies its logits by, as the configurations of its kind say it."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return 1.0 if divisor is None else 1 / float(divisor)
