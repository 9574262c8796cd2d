"""The seam between a causal language model and the fused loss: its backbone's hidden states and its head's weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


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
        text_config = model.config.get_text_config()
        softcap = getattr(text_config, "final_logit_softcapping", None)
        head = cls(model, softcap, None)
        obstacle = None
        if not isinstance(model.get_output_embeddings(), nn.Linear):
            obstacle = f"its head is {type(model.get_output_embeddings()).__name__}, not a linear layer"
        elif not head._explains_logits():
            obstacle = "its logits are not a linear (and softcapped) function of its last hidden state"
        return cls(model, softcap, obstacle)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Last hidden states, (B, T, D), after the final norm."""
        backbone = self.model.base_model
        return backbone(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """The model's own logits, (B, T, V)."""
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits

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
    def _explains_logits(self) -> bool:
        training = self.model.training
        self.model.eval()
        try:
            device = self.model.get_output_embeddings().weight.device
            tokens = torch.tensor([[1, 2]], device=device) % self.vocab
            mask = torch.ones_like(tokens)
            hidden = self.hidden(tokens, mask)
            logits = nn.functional.linear(hidden, self.weight, self.bias).float()
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            actual = self.logits(tokens, mask).float()
        except (AttributeError, TypeError, RuntimeError):
            return False
        finally:
            self.model.train(training)
        if actual.shape != logits.shape:
            return False
        spread = actual.std() + torch.finfo(torch.float32).tiny
        return bool(((actual - logits).abs().max() / spread) < 0.05)
