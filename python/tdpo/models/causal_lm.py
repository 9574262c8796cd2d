"""What the fused loss reads of a causal language model: hidden states of its backbone, weights of its head."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.collator import PreferenceCollator
from .attention_masks import branch_masks, takes_any_mask
from .sharding import full_tensor, is_sharded, stand_in

_LONGEST_PROBED_WINDOW = 64  # tokens: a probe beyond the windows of large models would take longer than it tells
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def unwrap_peft(model: nn.Module) -> nn.Module:
    """The causal language model inside a peft model, its adapters still in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


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

    model: nn.Module
    softcap: float | None
    logit_scale: float
    fallback_reason: str | None
    probed: nn.Module | None = None

    @property
    def _probe(self) -> CausalLM:
        return self if self.probed is None else replace(self, model=self.probed, probed=None)

    @classmethod
    def of(cls, model: nn.Module) -> CausalLM:
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
        return self.backbone(batch).last_hidden_state

    def backbone(self, batch: dict[str, Tensor], **options: bool) -> Any:
        """The output of the model without its head."""
        return self.model.base_model(**self._inputs(batch), **options)

    def logits(self, **batch: Tensor) -> Tensor:
        """The model's own logits, (B, T, V)."""
        return self.whole(batch).logits

    def whole(self, batch: dict[str, Tensor], **options: bool) -> Any:
        """The output of the model with its head."""
        return self.model(**self._inputs(batch), **options)

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
    def isolates_packed_sequences(self) -> bool:
        """Whether sequences packed into one row and separated by position_ids alone do not attend to each other."""
        probe = self._probe
        device = probe.weight.device
        tokens = (torch.arange(1, 9, device=device) % probe.vocab_size)[None]
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=device)
        packed = probe.hidden(input_ids=tokens, position_ids=positions)
        alone = probe.hidden(input_ids=tokens[:, 3:], position_ids=positions[:, 3:])
        return _equal_to_rounding(packed[:, 3:], alone)

    @torch.no_grad()
    def keeps_branches_apart(self) -> bool:
        """Whether responses that share a prompt, and pairs behind each other, have the hidden states of each alone.

        Attention must take a mask of any form, and every layer must attend within the window that the config tells.
        """
        probe, config = self._probe, self.model.config
        if not takes_any_mask(config):
            return False
        window = min(getattr(config.get_text_config(), "sliding_window", None) or 0, _LONGEST_PROBED_WINDOW)
        draw = torch.arange(window + 11) % (probe.vocab_size - 1) + 1
        first = {"prompt_ids": draw[: window + 3].tolist(), "chosen_ids": draw[-8:-4].tolist()}
        second = {**first, "prompt_ids": [2, 1], "rejected_ids": [1, 2, 3]}
        pairs = [{**first, "rejected_ids": draw[-4:].tolist()}, second]
        states = []
        was_training = probe.model.training
        probe.model.eval()
        try:
            for shared in (True, False):
                batch = PreferenceCollator(0, padding_free=shared, shared_prompts=shared)(pairs)
                tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
                batch = {name: value.to(probe.weight.device) for name, value in tensors.items()}
                states.append(probe.hidden(**batch).flatten(0, 1)[batch["rows"]])
        except (AttributeError, TypeError, ValueError, RuntimeError):
            return False
        finally:
            probe.model.train(was_training)
        together, apart = states
        return _equal_to_rounding(together, apart)

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


@dataclass(frozen=True)
class CachedReferenceHead:
    """The part of a reference that stays in memory when its hidden states are cached: its head, (V, D) and (V,).

    `softcap`, `logit_scale` and `fallback_reason` are those of `CausalLM`.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    fallback_reason: str | None

    @classmethod
    def copy_of(cls, reference: CausalLM) -> CachedReferenceHead:
        """A copy, so that the model can be freed or trained."""
        bias = None if reference.bias is None else reference.bias.detach().clone()
        return cls(
            weight=reference.weight.detach().clone(),
            bias=bias,
            softcap=reference.softcap,
            logit_scale=reference.logit_scale,
            fallback_reason=reference.fallback_reason,
        )

    @property
    def vocab_size(self) -> int:
        return len(self.weight)


def _logit_scale(config: Any) -> float:
    """What a model multiplies its logits by, as the configurations of its kind say it."""
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale = getattr(config, name, None)
        if scale is not None:
            return float(scale)
    divisor = getattr(config, "logits_scaling", None)  # Granite
    return 1.0 if divisor is None else 1 / float(divisor)


def _equal_to_rounding(some: Tensor, others: Tensor) -> bool:
    """Whether hidden states differ by no more than the order of summation explains."""
    rounded = torch.is_autocast_enabled(others.device.type) or others.dtype not in (torch.float32, torch.float64)
    tolerance = 0.02 if rounded else 1e-3
    return torch.allclose(some, others, rtol=tolerance, atol=tolerance * others.std().item())
