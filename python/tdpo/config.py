"""Options of the trainer: transformers' TrainingArguments and what TDPO adds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from transformers import TrainingArguments

from tdpo_ext import checks, dpo_loss, tdpo_loss
from tdpo_ext.losses import Objective, check_tdpo_options

from .fields import option

_CHOICES = {
    "variant": ("tdpo2", "tdpo1", "dpo"),
    "overlong": ("truncate", "drop"),
    "reference_dtype": ("bfloat16", "float16", "float32"),
}
_SWITCHES = ("disable_dropout", "padding_free", "precompute_reference", "remove_unused_columns")
_LEAST = {"max_length": 2, "max_prompt_length": 1, "eval_samples": 0, "eval_sample_tokens": 0}


@dataclass
class TDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus the options of the loss, of the reference and of the preference data.

    Raises:
        TypeError, ValueError: an option of the wrong type or out of range, named in the message.
    """

    beta: float = option(0.1, "Strength of the KL constraint, > 0.")
    alpha: float = option(0.5, "Weight of the sequence-KL difference in tdpo2, >= 0.")
    variant: str = option("tdpo2", "Loss: tdpo2, tdpo1 or dpo.")
    logits_budget: int | None = option(None, "Bytes that logits and other temporaries of the loss may take.")
    disable_dropout: bool = option(True, "Disable the policy's dropout, which the reference doesn't have either.")

    max_length: int = option(1024, "Maximum number of tokens of prompt and response together.")
    max_prompt_length: int = option(512, "Maximum number of tokens of the prompt; its end is kept.")
    overlong: str = option("truncate", "What to do with rows over these lengths: truncate or drop.")
    padding_free: bool = option(
        False, "Pack the sequences of a batch into one row without padding; needs a model that isolates them."
    )

    precompute_reference: bool = option(
        False, "Run the reference once, cache its hidden states on disk and keep only its head in memory."
    )
    reference_cache: str | None = option(
        None, "Folder of the reference's hidden states (default: reference-cache in output_dir)."
    )
    reference_dtype: str = option("bfloat16", "Precision of the cached hidden states: bfloat16, float16 or float32.")

    eval_samples: int = option(
        0, "Number of evaluation prompts that policy and reference continue, side by side, at every evaluation."
    )
    eval_sample_tokens: int = option(64, "Maximum number of tokens of such a continuation.")

    remove_unused_columns: bool = option(False, "Leave False: the collator reads columns that no model takes.")

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            checks.choice(name, getattr(self, name), allowed)
        check_tdpo_options(self.beta, self.alpha, "tdpo2" if self.variant == "dpo" else self.variant)
        for name, least in _LEAST.items():
            checks.integer(name, getattr(self, name), least=least)
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}; it must be below max_length, {self.max_length}"
            )
        if self.logits_budget is not None:
            checks.integer("logits_budget", self.logits_budget, least=1)
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is {getattr(self, name)!r}; True or False is needed")
        if not isinstance(self.reference_cache, (str, PathLike, type(None))):
            raise TypeError(f"reference_cache is {self.reference_cache!r}; the path of a folder is needed")
        super().__post_init__()

    @property
    def reference_folder(self) -> Path:
        """The folder of the reference's hidden states, with a subfolder for each split."""
        return Path(self.reference_cache or Path(self.output_dir or "", "reference-cache"))

    def objective(self) -> Objective:
        """The pairwise loss that these options name, as `tdpo_ext.linear_preference_loss` takes it."""
        if self.variant == "dpo":
            return functools.partial(dpo_loss, beta=self.beta)
        return functools.partial(tdpo_loss, beta=self.beta, alpha=self.alpha, variant=self.variant)
