"""What a run is: the options and data that must not change when it resumes. Every checkpoint holds it, as run.json."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from torch import nn
from transformers.trainer_pt_utils import AcceleratorConfig

from ..config import TDPOConfig
from ..data.stream import PreferenceStream
from ..data.tokenize import tokens_digest
from ..files import read_json, write_json
from ..models.causal_lm import unwrap_peft
from ..options import identity_options

logger = logging.getLogger(__name__)
FILE = "run.json"
_STREAM = "a stream"
_WEIGHTS = "weights of "
_NO_ADAPTER_OPTIONS = {"peft_version", "base_model_name_or_path"}  # the model is recorded under its own name


class RunRecord(NamedTuple):
    """What identifies a run, as JSON holds it."""

    options: dict[str, Any]
    training_data: str  # digest of the tokens, which streams have none of

    @classmethod
    def of(
        cls,
        args: TDPOConfig,
        model: nn.Module,
        ref_model: nn.Module | None,
        dataset: Dataset | PreferenceStream,
        *,
        weights: dict[str, str],
        dtypes: str,
        processes: int,
        objective: str | None,
    ) -> RunRecord:
        """The record of a training.

        Args:
            model, ref_model: unwrapped; the reference only where it is a second model.
            dataset: the tokenized training data.
            weights: digests of the policy's weights as it starts ("model") and of the reference's ("ref_model").
            dtypes: of the weights that train.
            processes: how many.
            objective: the name of a loss of the user's own, or None.
        """
        options = {name: getattr(args, name) for name in identity_options()}
        for adapters in getattr(model, "peft_config", {}).values():
            described = adapters.to_dict()
            options |= {f"adapters' {name}": described[name] for name in described.keys() - _NO_ADAPTER_OPTIONS}
        options |= {"dtype": dtypes, "processes": processes, "model": _name(model)}
        options |= {f"{_WEIGHTS}{name}": digest for name, digest in weights.items()}
        assert isinstance(args.accelerator_config, AcceleratorConfig)  # which transformers makes of what it is given
        if args.accelerator_config.split_batches:
            options["split_batches"] = True
        if ref_model is not None:
            options["ref_model"] = _name(ref_model)
        if objective is not None:
            options["objective"] = objective
        data = _STREAM if isinstance(dataset, PreferenceStream) else tokens_digest(dataset)
        return cls(json.loads(json.dumps(options, default=_plain)), data)

    def check(self, checkpoint: str | Path, *, anyway: bool) -> None:
        """Compares this run with the one that wrote a checkpoint.

        Raises:
            ValueError: options or data differ, which the message names; with `anyway` that is a warning.
        """
        path = Path(checkpoint, FILE)
        if not path.is_file():
            return
        differences = list(self._differences(read_json(path)))
        if not differences:
            return
        message = f"{checkpoint} is of another run: {'; '.join(differences)}"
        if not anyway:
            raise ValueError(f"{message}. Restore them, give another output_dir, or resume with --resume_anyway")
        logger.warning("%s; resuming all the same", message)

    def _differences(self, before: dict[str, Any]) -> Iterator[str]:
        old, new = before["options"], self.options
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) == new.get(name):
                continue
            if name.startswith(_WEIGHTS):  # digests tell nobody anything
                yield f"the {name} are others than those that it started with"
            else:
                yield f"{name} was {old.get(name)!r} and is {new.get(name)!r}"
        if before["training data"] != self.training_data:
            yield "the training data, as tokens, are others"

    def write(self, checkpoint: str | Path) -> None:
        write_json(Path(checkpoint, FILE), {"options": self.options, "training data": self.training_data})


def _name(model: Any) -> str:
    """A model's folder or hub name, and the GGUF file in it."""
    name = getattr(model.config, "_name_or_path", "")
    gguf_file = getattr(unwrap_peft(model), "gguf_file", None)
    return name if gguf_file is None else f"{name}/{gguf_file}"


def _plain(value: Any) -> Any:
    """An option that JSON has no form for."""
    return sorted(value) if isinstance(value, (set, frozenset)) else str(value)
