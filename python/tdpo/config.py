"""Options of the trainer: transformers' TrainingArguments and what TDPO adds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_pt_utils import AcceleratorConfig

from tdpo_ext import checks
from tdpo_ext.losses import Objective

from .data.forms import column_mapping
from .loss.objectives import OBJECTIVES, TrainedObjective
from .option_checks import check_options, check_own_objective
from .options import TDPOOptions
from .refusals import check_batches, refuse_for_device


@dataclass
class TDPOConfig(TDPOOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus the options of the loss, of the reference and of the preference data.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, named in the message.
    """

    output_dir: str = "trainer_output"  # transformers' default, never None here

    def __post_init__(self) -> None:
        check_options(self)
        self.columns = column_mapping(self.columns) or None
        refuse_for_device(self)
        super().__post_init__()
        assert isinstance(self.accelerator_config, AcceleratorConfig)  # which transformers makes of what it is given
        check_batches(self.accelerator_config)
        # Unset, accelerate would dispatch the batches of streams, on one process too.
        self.accelerator_config = replace(self.accelerator_config, dispatch_batches=False)

    @property
    def reference_folder(self) -> Path:
        """The folder of the reference's hidden states, with a subfolder for each split."""
        return Path(self.reference_cache or Path(self.output_dir, "reference-cache"))

    def trained_objective(self, own: Objective | None = None) -> TrainedObjective:
        """The loss that `variant` names, or `own` instead."""
        columns, named = self.token_columns or [], OBJECTIVES[self.variant]
        if own is not None:
            checks.function("objective", own)
            check_own_objective(self)
            return TrainedObjective(own, self.kl_direction or "forward", tuple(columns))
        return TrainedObjective(
            objective=named.build(self),
            kl_direction=self.kl_direction or named.kl_direction,
            token_columns=tuple(dict.fromkeys([*named.columns, *columns])),
        )
