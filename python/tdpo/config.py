"""Options of the trainer: transformers' TrainingArguments and what TDPO adds."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from transformers import TrainingArguments

from tdpo_ext import checks
from tdpo_ext.divergence import KL_DIRECTIONS
from tdpo_ext.losses import Objective

from .loss.objectives import OBJECTIVES, ObjectiveOptions, TrainedObjective
from .options import TDPOOptions

_CHOICES = {
    "variant": tuple(OBJECTIVES),
    "overlong": ("truncate", "drop"),
    "shared_prompts": ("auto", "always", "never"),
    "reference_dtype": ("bfloat16", "float16", "float32", "float8"),
}
_SWITCHES = ("disable_dropout", "padding_free", "precompute_reference", "resume_anyway", "remove_unused_columns")
_OPTIONAL_COUNTS = ("logits_budget", "dataset_num_proc")
# Options of transformers that work on logits, which this loss never forms, and the value that leaves them unused.
_NO_MEANING = {"label_smoothing_factor": 0.0, "use_liger_kernel": False}
_LEAST = {"max_length": 2, "max_prompt_length": 1, "eval_samples": 0, "eval_sample_tokens": 0}


@dataclass
class TDPOConfig(TDPOOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus the options of the loss, of the reference and of the preference data.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, named in the message.
    """

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            checks.choice(name, getattr(self, name), allowed)
        self.objective_options.check(self.variant)
        if self.kl_direction is not None:
            checks.choice("kl_direction", self.kl_direction, KL_DIRECTIONS)
        for name, least in _LEAST.items():
            checks.integer(name, getattr(self, name), least=least)
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}; it must be below max_length, {self.max_length}"
            )
        for name in _OPTIONAL_COUNTS:
            if getattr(self, name) is not None:
                checks.integer(name, getattr(self, name), least=1)
        checks.real("kl_warning", self.kl_warning, least=0)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; True or False is needed")
        columns = self.token_columns
        if columns is not None and not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
            raise TypeError(f"token_columns is {columns!r}; a list of names is needed")
        if not isinstance(self.reference_cache, (str, PathLike, type(None))):
            raise TypeError(f"reference_cache is {self.reference_cache!r}; the path of a folder is needed")
        for name, unused in _NO_MEANING.items():
            if getattr(self, name) != unused:
                raise ValueError(f"{name} is {getattr(self, name)}; it has no meaning for this loss: leave it unset")
        if self.learning_rate is not None:
            checks.real("learning_rate", self.learning_rate, least=0)
        super().__post_init__()

    @property
    def reference_folder(self) -> Path:
        """The folder of the reference's hidden states, with a subfolder for each split."""
        return Path(self.reference_cache or Path(self.output_dir or "", "reference-cache"))

    @property
    def objective_options(self) -> ObjectiveOptions:
        """The numbers of the loss."""
        return ObjectiveOptions(self.beta, self.alpha, self.label_smoothing, self.simpo_gamma)

    def trained_objective(self, own: Objective | None = None) -> TrainedObjective:
        """The loss that `variant` names, or `own` instead."""
        columns, named = self.token_columns or [], OBJECTIVES[self.variant]
        if own is not None:
            return TrainedObjective(own, self.kl_direction or "forward", tuple(columns))
        return TrainedObjective(
            objective=named.build(self.objective_options),
            kl_direction=self.kl_direction or named.kl_direction,
            token_columns=tuple(dict.fromkeys([*named.columns, *columns])),
        )
