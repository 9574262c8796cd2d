"""Random numbers in a model's forward pass: none while the reference runs, and no dropout in the policy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def evaluation_mode(model: nn.Module) -> AbstractContextManager[None]:
    """A context in which every module of a model is in evaluation mode, and after which each is in its own again."""
    return _evaluating(model.modules())


def without_wanted_noise(model: nn.Module, *, disabled_dropout: bool) -> AbstractContextManager[None]:
    """A context in which a model in training mode draws no random numbers but those that nobody asked for.

    Without effect are the dropout of adapters, noise on embeddings, jitter of routers, and the model's own dropout
    unless it was disabled: if it still acts then, it is a fault.
    """
    if not disabled_dropout:
        return evaluation_mode(model)
    noisy = [module for module in model.modules() if any(_is_noise(*item) for item in vars(module).items())]
    return _evaluating([*_adapter_modules(model), *noisy])


def _is_noise(name: str, value: Any) -> bool:
    return ("jitter" in name or "neftune" in name) and bool(value)


@contextmanager
def _evaluating(modules: Iterable[nn.Module]) -> Iterator[None]:
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def disable_dropout(model: nn.Module) -> None:
    """Sets the dropout of a model to 0, whether a module holds it, or a number in a module or in a configuration.

    The dropout of adapters is left as it is: whoever made them asked for it.
    """
    of_adapters = _adapter_modules(model)
    configured = vars(model).setdefault("_configured_dropout", [])
    for module in model.modules():
        if module in of_adapters:
            continue
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        for name in _dropout_numbers(module):
            setattr(module, name, 0.0)
        for config in _configurations(module):
            for name in _dropout_numbers(config):
                configured.append((config, name, getattr(config, name)))
                setattr(config, name, 0.0)


@contextmanager
def configured_dropout(model: nn.Module) -> Iterator[None]:
    """A context to save a model in: its configuration has the dropout that it was loaded with."""
    configured = vars(model).get("_configured_dropout", [])
    for config, name, value in configured:
        setattr(config, name, value)
    try:
        yield
    finally:
        for config, name, _ in configured:
            setattr(config, name, 0.0)


def _adapter_modules(model: nn.Module) -> set[nn.Module]:
    """The layers of peft's adapters, which may drop ranks or all that they add, and their parts, but what they wrap."""
    layers = [layer for layer in model.modules() if hasattr(layer, "base_layer")]
    added = (child for layer in layers for name, child in layer.named_children() if name != "base_layer")
    return {*layers, *(module for child in added for module in child.modules())}


def _configurations(module: nn.Module) -> Iterator[Any]:
    config: Any = getattr(module, "config", None)
    if hasattr(config, "get_text_config"):
        yield config
        if config.get_text_config() is not config:
            yield config.get_text_config()


def _dropout_numbers(owner: Any) -> list[str]:
    """The names of an object's dropout probabilities: attention_dropout, resid_pdrop, layerdrop, ..."""
    return [name for name, value in vars(owner).items() if "drop" in name and isinstance(value, float) and value > 0]
