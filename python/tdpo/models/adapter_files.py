"""Adapters on disk: every one of a model's in its folder, and in those of the active ones what trains beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import write_bytes
from .parameter_values import named_parameters


def trained_beside(model: Any) -> Iterator[str]:
    """The names of trainable parameters beside adapters that none of them holds: peft names what one holds by it."""
    for name, parameter in named_parameters(model) if _is_peft_model(model) else ():
        if parameter.requires_grad and not set(name.split(".")) & set(model.peft_config):
            yield name


def save_what_trains_beside(model: Any, folder: str | Path, values: dict[str, Tensor] | None) -> None:
    """Adds trained parameters that no adapter holds, such as unfrozen norms, to what peft has saved without them.

    peft loads whatever it finds in these files by name, here as in `PeftModel.from_pretrained`.

    Args:
        model: one without adapters is saved whole.
        folder: that it was saved in.
        values: its parameters by name where an engine has gathered them; None takes its own.
    """
    names = list(trained_beside(model))
    if not names:
        return
    from safetensors.torch import load_file, save

    values = dict(named_parameters(model)) if values is None else values  # type: ignore[arg-type]
    beside = {name: values[name].detach().cpu().contiguous() for name in names}
    for adapter in model.active_adapters:
        path = _weights_file(folder, adapter)
        write_bytes(path, save({**load_file(path), **beside}, metadata={"format": "pt"}))


@torch.no_grad()
def load_adapters(model: Any, folder: str | Path) -> bool:
    """Loads every adapter of a model, and what trained beside them; which are active and which train stays as it is.

    Returns:
        Whether it has adapters.

    Raises:
        ValueError: the folder lacks one of them; the message names it.
    """
    if not _is_peft_model(model):
        return False
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    for adapter in model.peft_config:
        path = _weights_file(folder, adapter)
        if not path.is_file():
            raise ValueError(f"{path}, of the adapter {adapter!r}, is missing")
        set_peft_model_state_dict(model, load_file(path), adapter_name=adapter)
    return True


def _is_peft_model(model: nn.Module) -> bool:
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def _weights_file(folder: str | Path, adapter: str) -> Path:
    """Where peft saves an adapter."""
    return Path(folder, *([] if adapter == "default" else [adapter]), "adapter_model.safetensors")
