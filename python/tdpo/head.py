"""The seam between a causal language model and the fused loss: its backbone's hidden states and its head's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def unwrapped(model: nn.Module) -> nn.Module:
    """The causal language model inside a peft model (its adapters stay in place), or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@dataclass(frozen=True)
class LanguageModelHead:
    """How a model's logits come from its hidden states, or why that can't be told.

    Attributes:
        model: the causal language model.
        softcap: the model caps its logits as softcap * tanh(logits / softcap); None if it doesn't.
        obstacle: why the head can't be fused; None if it can.
    """

    model: nn.Module
    softcap: float | None
    obstacle: str | None

    @classmethod
    def of(cls, model: nn.Module) -> LanguageModelHead:
        """Looks at a model and, on two tokens, holds its own logits against those formed from its hidden states."""
        model = unwrapped(model)
        softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
        head = cls(model, softcap, None)
        obstacle = None
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            obstacle = f"its head is {type(model.get_output_embeddings()).__name__}, not a linear layer"
        elif not head._explains_logits():
            obstacle = "its logits are not a linear (and softcapped) function of its last hidden state"
        return cls(model, softcap, obstacle)

    def hidden(self, **batch: Tensor) -> Tensor:
        """Last hidden states, (B, T, D), after the final norm."""
        return self.model.base_model(**_inputs(batch)).last_hidden_state

    def logits(self, **batch: Tensor) -> Tensor:
        """The model's own logits, (B, T, V)."""
        return self.model(**_inputs(batch)).logits

    @property
    def vocab(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def weight(self) -> Tensor:  # (V, D)
        return self.model.get_output_embeddings().weight

    @property
    def bias(self) -> Tensor | None:  # (V,)
        return self.model.get_output_embeddings().bias

    @torch.no_grad()
    def keeps_sequences_apart(self) -> bool:
        """Whether two sequences packed into one row, told apart by position_ids alone, do not see each other."""
        device = self.weight.device
        tokens = (torch.arange(1, 9, device=device) % self.vocab)[None]
        positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=device)
        packed = self.hidden(input_ids=tokens, position_ids=positions)
        alone = self.hidden(input_ids=tokens[:, 3:], position_ids=positions[:, 3:])
        return torch.allclose(packed[:, 3:], alone, rtol=0.02, atol=0.02 * alone.std().item())

    @torch.no_grad()
    def _explains_logits(self) -> bool:
        training = self.model.training
        self.model.eval()
        try:
            tokens = torch.tensor([[1, 2]], device=self.model.get_output_embeddings().weight.device) % self.vocab
            batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
            bias = None if self.bias is None else _whole(self.bias)
            logits = nn.functional.linear(self.hidden(**batch), _whole(self.weight), bias).float()
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            actual = _whole(self.logits(**batch)).float()
        except (AttributeError, TypeError, RuntimeError):
            return False
        finally:
            self.model.train(training)
        if actual.shape != logits.shape:
            return False
        spread = actual.std() + torch.finfo(torch.float32).tiny
        return bool(((actual - logits).abs().max() / spread) < 0.05)


@dataclass(frozen=True)
class FrozenHead:
    """What is left of a reference whose hidden states are cached: weight (V, D) and bias (V,) as they were."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    obstacle: str | None

    @classmethod
    def of(cls, head: LanguageModelHead) -> FrozenHead:
        """A copy, so that the model may go, or be trained."""
        bias = None if head.bias is None else head.bias.detach().clone()
        return cls(head.weight.detach().clone(), bias, head.softcap, head.obstacle)

    @property
    def vocab(self) -> int:
        return len(self.weight)


def _whole(tensor: Tensor) -> Tensor:
    """A head that is sharded over ranks, or its logits, gathered."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _inputs(batch: dict[str, Tensor]) -> dict:
    return {**{name: batch[name] for name in _MODEL_INPUTS if name in batch}, "use_cache": False}
