"""Options of the trainer: transformers' TrainingArguments and what TDPO adds."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, get_type_hints

from transformers import TrainingArguments

from tdpo_ext import checks
from tdpo_ext.losses import Objective

from .data.forms import column_mapping
from .loss.objectives import OBJECTIVES, TrainedObjective, check_objective_options
from .options import TDPOOptions
from .refusals import OF_TRANSFORMERS, refuse


@dataclass
class TDPOConfig(TDPOOptions, TrainingArguments):
    """`transformers.TrainingArguments` plus the options of the loss, of the reference and of the preference data.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, named in the message.
    """

    output_dir: str = "trainer_output"  # transformers' default, never None here

    def __post_init__(self) -> None:
        types = get_type_hints(TDPOOptions)
        for item in fields(TDPOOptions):
            _check(item, types[item.name], getattr(self, item.name))
        check_objective_options(self)
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}; it must be below max_length, {self.max_length}"
            )
        self.columns = column_mapping(self.columns) or None
        columns = self.token_columns
        if columns is not None and not (isinstance(columns, list) and all(isinstance(name, str) for name in columns)):
            raise TypeError(f"token_columns is {columns!r}; a list of names is needed")
        if not isinstance(self.reference_cache, (str, PathLike, type(None))):
            raise TypeError(f"reference_cache is {self.reference_cache!r}; the path of a folder is needed")
        refuse(self, OF_TRANSFORMERS)
        super().__post_init__()

    @property
    def reference_folder(self) -> Path:
        """The folder of the reference's hidden states, with a subfolder for each split."""
        return Path(self.reference_cache or Path(self.output_dir, "reference-cache"))

    def trained_objective(self, own: Objective | None = None) -> TrainedObjective:
        """The loss that `variant` names, or `own` instead."""
        columns, named = self.token_columns or [], OBJECTIVES[self.variant]
        if own is not None:
            checks.function("objective", own)
            return TrainedObjective(own, self.kl_direction or "forward", tuple(columns))
        return TrainedObjective(
            objective=named.build(self),
            kl_direction=self.kl_direction or named.kl_direction,
            token_columns=tuple(dict.fromkeys([*named.columns, *columns])),
        )


def _check(item: Field, kind: Any, value: Any) -> None:
    """Checks an option's value against its type and its metadata (see `options.option`)."""
    choices, least = item.metadata.get("choices"), item.metadata["help"].least
    if value is None and item.default is None:
        return
    if choices is not None:
        checks.choice(item.name, value, choices)
    if kind is bool and not isinstance(value, bool):
        raise TypeError(f"{item.name} is {value!r}; True or False is needed")
    if least is not None:
        (checks.integer if kind in (int, int | None) else checks.real)(item.name, value, least=least)
