"""Adapters in checkpoints: all of them, and what trains beside them, whichever trainer writes and reads them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from ..models.adapter_files import load_adapters, save_what_trains_beside, trained_beside


class WholeAdapters(Trainer):
    """A Trainer that saves and loads adapters whole: transformers loads some of several, and activates the first."""

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains, where checkpoints can hold all that trains.

        Raises:
            ValueError: under FSDP, something trains beside adapters.
        """
        beside = list(trained_beside(self.model)) if self.is_fsdp_enabled else []
        if beside:
            raise ValueError(
                f"model trains {beside[0]} beside its adapters, which FSDP's checkpoints would not hold: freeze it, or "
                "put it into modules_to_save of the adapters"
            )
        return super().train(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_what_trains_beside(self.model, output_dir or str(self.args.output_dir), state_dict)

    def _load_best_model(self) -> None:
        if self._has_engine():
            super()._load_best_model()
        else:
            assert self.state.best_model_checkpoint is not None
            self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._has_engine() or not load_adapters(self.model, resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _has_engine(self) -> bool:
        """Whether FSDP or DeepSpeed wraps the policy when it trains."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled
