"""Options of the trainer: transformers' TrainingArguments and what TDPO adds."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from transformers import TrainingArguments

from tdpo_ext import dpo_loss, tdpo_loss
from tdpo_ext.losses import Objective, check_beta, check_tdpo_options

from .fields import option

_CHOICES = {
    "variant": ("tdpo2", "tdpo1", "dpo"),
    "overlong": ("truncate", "drop"),
    "reference_dtype": ("bfloat16", "float16", "float32"),
}


@dataclass
class TDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus the options of the loss, of the reference and of the preference data.

    Raises:
        ValueError: an option out of range, named in the message.
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
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        if self.variant == "dpo":
            check_beta(self.beta)
        else:
            check_tdpo_options(self.beta, self.alpha, self.variant)
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}; it must be positive and below max_length, "
                f"{self.max_length}"
            )
        for name in ("eval_samples", "eval_sample_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
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
