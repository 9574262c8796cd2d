"""Options of the trainer: transformers' TrainingArguments and what TDPO adds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

from transformers import TrainingArguments

from tdpo_ext import dpo_loss, tdpo_loss
from tdpo_ext.losses import check_loss_options

_CHOICES = {
    "variant": ("tdpo2", "tdpo1", "dpo"),
    "overlong": ("truncate", "drop"),
    "reference_dtype": ("bfloat16", "float16", "float32"),
}


def _option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus the options of the loss, of the reference and of the preference data."""

    beta: float = _option(0.1, "Strength of the KL constraint, > 0.")
    alpha: float = _option(0.5, "Weight of the sequence-KL difference in tdpo2, >= 0.")
    variant: str = _option("tdpo2", "Loss: tdpo2, tdpo1 or dpo.")
    logits_budget: int | None = _option(None, "Bytes that logits and other temporaries of the loss may take.")
    disable_dropout: bool = _option(
        True, "Switch the policy's dropout off, so that it is compared as the reference is."
    )

    max_length: int = _option(1024, "Tokens of prompt and response together, at most.")
    max_prompt_length: int = _option(512, "Tokens of the prompt, at most; its end is kept.")
    overlong: str = _option("truncate", "What becomes of rows over these lengths: truncate or drop.")
    padding_free: bool = _option(
        False, "Pack the sequences of a batch into one row without padding; needs a model that keeps them apart."
    )

    precompute_reference: bool = _option(
        False, "Run the reference once, keep its hidden states on disk and only its head in memory."
    )
    reference_cache: str | None = _option(
        None, "Folder of the reference's hidden states (default: reference-cache in output_dir)."
    )
    reference_dtype: str = _option("bfloat16", "Precision of the cached hidden states: bfloat16, float16 or float32.")

    eval_samples: int = _option(
        0, "At every evaluation, this many evaluation prompts are continued by policy and reference, side by side."
    )
    eval_sample_tokens: int = _option(64, "Tokens of such a sample, at most.")

    remove_unused_columns: bool = _option(False, "Kept False: the collator reads columns that the model doesn't know.")

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}")
        check_loss_options(self.beta, self.alpha, "tdpo2" if self.variant == "dpo" else self.variant)
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
        """Where the reference's hidden states are kept, a folder a split."""
        return Path(self.reference_cache or Path(self.output_dir or "", "reference-cache"))

    def objective(self):
        """The pairwise loss that these options name, as `tdpo_ext.linear_preference_loss` takes it."""
        if self.variant == "dpo":
            return functools.partial(dpo_loss, beta=self.beta)
        return functools.partial(tdpo_loss, beta=self.beta, alpha=self.alpha, variant=self.variant)
