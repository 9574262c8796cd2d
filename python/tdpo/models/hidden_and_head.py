"""What a training loop of one's own reads of a causal language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import PreTrainedModel

from .causal_lm import CausalLM, unwrap_peft
from .sharding import is_sharded, is_tensor_parallel

_SEEN: WeakKeyDictionary[nn.Module, tuple[float | None, float]] = WeakKeyDictionary()  # cap and scale of models


@dataclass(frozen=True)
class LMHead:
    """A model's head, and what the model does to its output.

    Attributes:
        weight: (V, D), with its gradient; where adapters add to the head, several that lie side by side, (V, D_i).
        bias: (V,), or None.
        softcap: logits become softcap * tanh(logits / softcap); None if they don't.
        logit_scale: logits are multiplied by it before.
    """

    weight: Tensor | tuple[Tensor, ...]
    bias: Tensor | None
    softcap: float | None
    logit_scale: float

    def options(self, reference: LMHead) -> dict[str, Any]:
        """What the fused losses must know of both heads besides their weights, as keywords of `linear_preference_loss`.

        Raises:
            ValueError: policy and reference cap their logits differently.
        """
        if self.softcap != reference.softcap:
            raise ValueError(f"the policy's softcap is {self.softcap}, but the reference's is {reference.softcap}")
        return {
            "bias": self.bias,
            "ref_bias": reference.bias,
            "softcap": self.softcap,
            "logit_scale": self.logit_scale,
            "ref_logit_scale": reference.logit_scale,
        }


def hidden_and_head(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, LMHead]:
    """The hidden states of a batch and the model's head: what `tdpo_ext`'s fused losses take.

    The model is run as it is: in training or evaluation mode, with the adapters that are active, with or without
    gradients. At a model's first call, its logits for two tokens are compared with those formed from its hidden states.

    Args:
        model: a causal language model of transformers, or a peft model, as this process can run it alone.
        batch: of `PreferenceCollator`, on the model's device; or your own, with `input_ids`, (B, T), and what else of
            `attention_mask` and `position_ids` the model needs.

    Returns:
        The hidden states, after the final norm: (R, D) of the response tokens, as `batch["targets"]` and
        `batch["row_lengths"]` of `PreferenceCollator` have them; (B, T, D) of a batch of your own. Where adapters add
        to the head, the inputs of their weights stand behind them. And the head.

    Raises:
        ValueError: the model's logits are no such function of its hidden states, or an engine has wrapped or spread it.
    """
    causal_lm = unwrap_peft(model)
    if not isinstance(causal_lm, PreTrainedModel):  # DeepSpeed's engine passes for one, by its attributes
        raise ValueError(f"model is a {type(model).__name__}; a model of transformers or peft is needed, not a wrapper")
    if is_sharded(model) or is_tensor_parallel(causal_lm):
        raise ValueError("model is spread over processes, and only its engine can run it: use tdpo.TDPOTrainer")
    if causal_lm not in _SEEN:
        found = CausalLM.of(causal_lm)
        if found.fallback_reason is not None:
            raise ValueError(f"model can't be used: {found.fallback_reason}; take its logits, for token_divergence")
        _SEEN[causal_lm] = found.softcap, found.logit_scale
    described = CausalLM(causal_lm, *_SEEN[causal_lm])
    inputs = dict(batch)
    head = described.head
    hidden = described.hidden_rows(inputs).values if "rows" in inputs else head.inputs(described.hidden(**inputs))
    weight: Tensor | tuple[Tensor, ...] = head.weights[0]
    if len(head.weights) > 1:  # peft keeps adapters in float32 beside weights in less
        weight = tuple(part.to(hidden.dtype) for part in head.weights)
    return hidden, LMHead(weight, head.bias, described.softcap, described.logit_scale)
