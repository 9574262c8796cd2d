"""What the fused loss reads of a causal language model: hidden states of its backbone, weights of its head."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from .attention_masks import branch_masks
from .heads import HeadParts, head_parts
from .noise import evaluation_mode
from .sharding import full_tensor, is_sharded, is_tensor_parallel
from .stand_ins import stand_in

if TYPE_CHECKING:
    from typing_extensions import Self

# Cohere; Falcon-H1; Granite, which divides, HyperCLOVA X, which multiplies, and MiniCPM 3; Inkling; Muse
_SCALES = ("logit_scale", "lm_head_multiplier", "logits_scaling", "logits_mup_width_multiplier", "output_multiplier")
_LOUDNESS = (0.0, 200.0)  # spreads of the logits that the head is tried at; 0 leaves them as they are
_MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")


def unwrap_peft(model: Any) -> PreTrainedModel:
    """The causal language model inside a peft model, its adapters still in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class ResponseRows(NamedTuple):
    """What a model gives for the response tokens of a batch.

    Attributes:
        values: what the head's weights are multiplied by to predict them, (R, D): hidden states and, behind these, the
            inputs of its adapters (`HeadParts.inputs`). Or their logits, (R, V).
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
        probed: what is run in place of `model` to find out what it does; a stand-in where an engine has spread `model`.
    """

    model: PreTrainedModel
    softcap: float | None = None
    logit_scale: float = 1.0
    fallback_reason: str | None = None
    probed: PreTrainedModel | None = None

    @property
    def probe(self) -> CausalLM:
        """The same model in a form that this process can run alone."""
        return self if self.probed is None else replace(self, model=self.probed, probed=None)

    @classmethod
    def of(cls, model: nn.Module, *, will_be_spread: bool = False) -> Self:
        """Inspects a model and, on two tokens, compares its own logits with those formed from its hidden states.

        Args:
            will_be_spread: an engine will spread its weights over processes.
        """
        model = unwrap_peft(model)
        probed = stand_in(model) if is_sharded(model) else model
        head = model.get_output_embeddings()
        parts = head_parts(head)
        if isinstance(parts, str):
            return cls(model, fallback_reason=parts, probed=probed)
        spread = will_be_spread or is_sharded(model) or is_tensor_parallel(model)
        if spread and not isinstance(head, nn.Linear):
            reason = "its head has adapters, and its weights are spread over processes"
            return cls(model, fallback_reason=reason, probed=probed)
        found = _how_logits_are_made(cls(probed))
        if isinstance(found, str):
            return cls(model, fallback_reason=found, probed=probed)
        softcap, scale = found
        return cls(model, softcap, scale, probed=probed)

    def hidden(self, **batch: Any) -> Tensor:
        """Last hidden states, (B, T, D), after the final norm; `batch` as of `PreferenceCollator`."""
        return self._run(self.model.base_model, "last_hidden_state", batch)[0]

    def logits(self, **batch: Any) -> Tensor:
        """The model's own logits, (B, T, V)."""
        return self._run(self.model, "logits", batch)[0]

    def hidden_rows(self, batch: dict[str, Any], **options: bool) -> ResponseRows:
        """What the head's weights are multiplied by to predict a batch's response tokens; `options` are the model's."""
        read = self._run(self.model.base_model, "last_hidden_state", batch, **options)
        rows = _response_rows(*read, batch["rows"])
        return rows._replace(values=self.head.inputs(rows.values))

    def logit_rows(self, batch: dict[str, Any], **options: bool) -> ResponseRows:
        """The logits of the response tokens of a batch."""
        return _response_rows(*self._run(self.model, "logits", batch, **options), batch["rows"])

    def _run(self, module: Any, name: str, batch: dict[str, Any], **options: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """An output of a model or its backbone, (B, T, ...), and its router logits, (B T, experts) of every layer."""
        if "row_lengths_alone" not in batch:
            output = module(**self._inputs(batch), **options)
            return getattr(output, name), getattr(output, "router_logits", None) or ()
        rows = [ids[None, :length] for ids, length in zip(batch["input_ids"], batch["row_lengths_alone"])]
        outputs = [module(input_ids=ids, use_cache=False, **options) for ids in rows]
        values = pad_sequence([getattr(output, name)[0] for output in outputs], batch_first=True)
        layers = zip(*(getattr(output, "router_logits", None) or () for output in outputs))
        return values, tuple(pad_sequence(list(layer), batch_first=True).flatten(0, 1) for layer in layers)

    def _inputs(self, batch: dict[str, Any]) -> dict[str, Any]:
        inputs: dict[str, Any] = {name: batch[name] for name in _MODEL_INPUTS if name in batch}
        if "segments" in batch:
            places = {"positions": batch["position_ids"], "segments": batch["segments"]}
            inputs["attention_mask"] = branch_masks(self.model.config, self.weight.dtype, **places)
        return {**inputs, "use_cache": False}

    def first_tokens(self, count: int) -> dict[str, Tensor]:
        """Inputs to try the model on: the token ids 1, 2, ..., (1, count)."""
        embedding: Any = self.model.get_input_embeddings()
        tokens = torch.arange(1, count + 1, device=embedding.weight.device)[None] % self.vocab_size
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    @property
    def low_precision(self) -> bool:
        """It computes in less than float32: in the precision of its weights, or by autocast."""
        autocast = torch.is_autocast_enabled(self.model.device.type)
        return autocast or self.model.dtype not in (torch.float32, torch.float64)

    @property
    def vocab_size(self) -> int:
        return self.model.config.get_text_config().vocab_size

    @property
    def head(self) -> HeadParts:
        """The head as it is now.

        Raises:
            ValueError: it can't be fused.
        """
        parts = head_parts(self.model.get_output_embeddings())
        if isinstance(parts, str):
            raise ValueError(f"a head can't be fused: {parts}")
        return parts

    @property
    def weight(self) -> Tensor:  # (V, D)
        """Of the head, without what adapters add."""
        head = self.model.get_output_embeddings()
        parts = head_parts(head)
        return head.weight if isinstance(parts, str) else parts.weights[0]

    @property
    def bias(self) -> Tensor | None:  # (V,)
        return self.head.bias


@torch.no_grad()
def _how_logits_are_made(model: CausalLM) -> tuple[float | None, float] | str:
    """The cap and the scale of a model's logits, among the numbers of its configuration; or why none fit.

    The model's logits for two tokens are compared with those formed from its hidden states: as they are, and with the
    head's input multiplied, since a cap shows at large logits alone.
    """
    try:
        with evaluation_mode(model.model):
            batch = model.first_tokens(2)
            hidden, head = model.hidden(**batch), _whole(model.head)
            size = head.linear(hidden).float().std()
            factors = (hidden.new_tensor(_LOUDNESS) / size.to(hidden.dtype).clamp_min(1e-3)).clamp_min(1)
            with _multiplied_input(model.model.get_output_embeddings(), factors[:, None]):
                actual = full_tensor(model.logits(**batch)).float()
            linear = head.linear(hidden * factors[:, None])
    except (AttributeError, TypeError, RuntimeError) as error:
        return f"its backbone or its logits can't be tried on two tokens: {' '.join(str(error).split())}"
    tolerance = 2e-5 if linear.dtype in (torch.float32, torch.float64) else 2 * torch.finfo(linear.dtype).eps
    config, linear = model.model.config.get_text_config(), linear.float()
    for softcap in _softcaps(config):
        for scale in _logit_scales(config):
            formed = linear * scale
            if softcap is not None:
                formed = softcap * torch.tanh(formed / softcap)
            allowed = tolerance * (formed.abs() + formed.square().mean(-1, keepdim=True).sqrt())
            if actual.shape == formed.shape and ((actual - formed).abs() <= allowed).all():
                return softcap, scale
    return "its logits are not a linear (scaled, softcapped) function of its last hidden state"


def _whole(head: HeadParts) -> HeadParts:
    bias = None if head.bias is None else full_tensor(head.bias)
    return replace(head, weights=tuple(map(full_tensor, head.weights)), bias=bias)


@contextmanager
def _multiplied_input(module: nn.Module, factors: Tensor) -> Iterator[None]:
    """A context in which a module's input is multiplied, before hooks of tensor parallelism make it a DTensor."""
    hook = module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * factors, *inputs[1:]), prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _softcaps(config: Any) -> list[float | None]:
    """What a configuration may cap logits at: final_logit_softcapping (Gemma), logits_soft_cap (RecurrentGemma), ..."""
    names = [
        name
        for name in vars(config)
        if re.search(r"logits?_?.*cap", name) and not re.search("attn|attention|router", name)
    ]
    values = [getattr(config, name) for name in names]
    return [*(float(value) for value in values if isinstance(value, (int, float)) and value > 0), None]


def _logit_scales(config: Any) -> list[float]:
    """What a configuration may multiply or divide logits by, or the hidden states before the head."""
    values = [getattr(config, name, None) for name in _SCALES]
    factors = [float(value) for value in values if isinstance(value, (int, float)) and value > 0]
    return [*factors, *(1 / factor for factor in factors), 1.0]


def _response_rows(values: Tensor, router_logits: tuple[Tensor, ...], rows: Tensor) -> ResponseRows:
    return ResponseRows(values.flatten(0, 1)[rows], router_logits)
