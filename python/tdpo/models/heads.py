"""LM heads as the fused losses take them: one weight or, where adapters of peft add to it, several side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class HeadParts:
    """A head, linear in what `inputs` makes of hidden states.

    Attributes:
        weights: (V, D) and, of what adapters add, (V, r) each.
        bias: (V,), or None.
        added: of each of the other weights, its inputs (R, r) from hidden states (R, D).
    """

    weights: tuple[Tensor, ...]
    bias: Tensor | None
    added: tuple[Callable[[Tensor], Tensor], ...] = ()

    def inputs(self, hidden: Tensor) -> Tensor:
        """What the weights are multiplied by: hidden states (..., D), and behind them the inputs of the others."""
        if not self.added:
            return hidden
        return torch.cat([hidden, *(inputs(hidden).to(hidden.dtype) for inputs in self.added)], dim=-1)

    def linear(self, hidden: Tensor) -> Tensor:
        """The head's output, materialised."""
        pieces = self.inputs(hidden).split([weight.shape[1] for weight in self.weights], dim=-1)
        outputs = [piece @ weight.to(piece.dtype).t() for piece, weight in zip(pieces, self.weights)]
        return sum(outputs[1:], start=outputs[0]) + (0 if self.bias is None else self.bias)


def head_parts(head: nn.Module) -> HeadParts | str:
    """The parts of a head as it is: of its adapters, those that are in use. Or why it is no linear function of them."""
    if "peft" in sys.modules:  # otherwise there are no adapters, and to import it takes seconds
        from peft.tuners.lora import Linear as LoraLinear
        from peft.tuners.trainable_tokens import TrainableTokensLayer
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import ModulesToSaveWrapper
        from peft.utils.other import TrainableTokensWrapper

        if isinstance(head, ModulesToSaveWrapper):
            return head_parts(_module_in_use(head))
        if isinstance(head, TrainableTokensWrapper):
            head = head.token_adapter
        if isinstance(head, TrainableTokensLayer):
            return _with_trained_tokens(head)
        if isinstance(head, LoraLinear):
            return _with_lora(head)
        if isinstance(head, BaseTunerLayer):
            return f"its head has adapters of the kind {type(head).__module__.split('.')[-2]}"
    if not isinstance(head, nn.Linear):
        return f"its head is {type(head).__name__}, not a linear layer"
    return HeadParts((head.weight,), head.bias)


def _module_in_use(wrapper: Any) -> nn.Module:
    """Of a module that is trained as a whole beside adapters: its copy, or itself where the adapters are off."""
    names = [] if wrapper.disable_adapters else wrapper.active_adapters
    return wrapper.modules_to_save[names[0]] if names else wrapper.original_module


def _with_lora(layer: Any) -> HeadParts | str:
    """W and, of every adapter, B: its inputs are s A h."""
    base = head_parts(layer.get_base_layer())
    if isinstance(base, str) or layer.disable_adapters or layer.merged:
        return base
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    for name in names:
        if name in layer.lora_variant:
            return f"its head has an adapter of LoRA's variant {type(layer.lora_variant[name]).__name__}"
        if layer.lora_bias.get(name):
            return "its head has a LoRA adapter with a bias"

    def inputs(name: str) -> Callable[[Tensor], Tensor]:
        first, dropout, scaling = layer.lora_A[name], layer.lora_dropout[name], layer.scaling[name]
        return lambda hidden: scaling * first(dropout(hidden.to(first.weight.dtype)))

    added = tuple(layer.lora_B[name].weight for name in names)
    return HeadParts((*base.weights, *added), base.bias, (*base.added, *map(inputs, names)))


def _with_trained_tokens(layer: Any) -> HeadParts | str:
    """W and, of the tokens whose rows T stand in place of W's, columns that have 1 at a token: their inputs are
    (T - W) h."""
    base = head_parts(layer.get_base_layer())
    if isinstance(base, str) or layer.disable_adapters or layer.merged or not layer.active_adapters:
        return base
    if base.bias is not None:
        return "its head has a bias, and trained tokens, without which peft runs it"
    ((name, *others), (weight,)) = layer.active_adapters, base.weights
    if others:
        return "its head has trained tokens of several adapters"
    tokens, chosen = _chosen_tokens(layer, tuple(layer.token_indices[name]), weight)
    rows = layer.trainable_tokens_delta[name]

    def inputs(hidden: Tensor) -> Tensor:
        return hidden @ (rows.to(hidden.dtype) - weight[tokens].to(hidden.dtype)).t()

    return HeadParts((weight, chosen), None, (inputs,))


_CHOSEN: WeakKeyDictionary[nn.Module, dict[Any, tuple[Tensor, Tensor]]] = WeakKeyDictionary()  # of layers


def _chosen_tokens(layer: nn.Module, ids: tuple[int, ...], weight: Tensor) -> tuple[Tensor, Tensor]:
    """Token ids on the device, and (V, tokens), 1 where a column's token is; made once, as the host waits for it."""
    made = _CHOSEN.setdefault(layer, {})
    key = ids, weight.shape[0], weight.dtype, weight.device
    if key not in made:
        with torch.inference_mode(False):  # they are used again in training
            tokens = torch.tensor(ids, device=weight.device)
            chosen = torch.zeros(len(weight), len(ids), dtype=weight.dtype, device=weight.device)
            chosen[tokens, torch.arange(len(ids), device=weight.device)] = 1
        made[key] = tokens, chosen
    return made[key]
