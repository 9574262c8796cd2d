"""What a run is: the options and data that must not change when it resumes. Every checkpoint holds it, as run.json."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.load import tokens_digest
from ..files import read_json, write_json
from ..models.causal_lm import unwrap_peft
from ..options import identity_options

if TYPE_CHECKING:
    from ..trainer import TDPOTrainer

logger = logging.getLogger(__name__)
FILE = "run.json"
_ADAPTERS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora")


def record_of(trainer: TDPOTrainer) -> dict[str, Any]:
    """What identifies the trainer's run, as JSON holds it."""
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    options = {name: _plain(getattr(args, name)) for name in identity_options()}
    for adapters in getattr(model, "peft_config", {}).values():
        options |= {f"adapters' {name}": _plain(getattr(adapters, name, None)) for name in _ADAPTERS}
    options["dtype"] = trainer.trained_dtypes
    options["processes"] = trainer.accelerator.num_processes
    options["model"] = _name(model)
    if trainer.ref_model is not None:
        options["ref_model"] = _name(trainer.accelerator.unwrap_model(trainer.ref_model))
    return {"options": options, "training data": tokens_digest(trainer.train_dataset)}


def _name(model: Any) -> str:
    """A model's folder or hub name, and the GGUF file in it."""
    name = getattr(model.config, "_name_or_path", "")
    gguf_file = getattr(unwrap_peft(model), "gguf_file", None)
    return name if gguf_file is None else f"{name}/{gguf_file}"


def _plain(value: Any) -> Any:
    """An option as JSON returns it."""
    value = getattr(value, "value", value)  # of an enumeration
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value if isinstance(value, (bool, int, float, str, list, dict, type(None))) else str(value)


def check_same_run(checkpoint: str | Path, record: dict[str, Any], *, anyway: bool) -> None:
    """Compares a run with the one that wrote a checkpoint.

    Raises:
        ValueError: options or data differ, which the message names; with `anyway` that is a warning.
    """
    path = Path(checkpoint, FILE)
    if not path.is_file():
        return
    differences = list(_differences(read_json(path), record))
    if not differences:
        return
    message = f"{checkpoint} is of another run: {'; '.join(differences)}"
    if not anyway:
        raise ValueError(f"{message}. Restore them, give another output_dir, or resume with --resume_anyway")
    logger.warning("%s; resuming all the same", message)


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    old, new = before["options"], now["options"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            yield f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
    if before["training data"] != now["training data"]:
        yield "the training data, as tokens, are others"


def write_record(checkpoint: str | Path, record: dict[str, Any]) -> None:
    write_json(Path(checkpoint, FILE), record)
