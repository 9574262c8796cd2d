"""Options of the trainer: transformers' TrainingArguments and what TDPO adds."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from transformers import TrainingArguments

from tdpo_ext import dpo_loss, tdpo_loss
from tdpo_ext.losses import check_loss_options

VARIANTS = ("tdpo2", "tdpo1", "dpo")


@dataclass
class TDPOConfig(TrainingArguments):
    """`transformers.TrainingArguments` plus the options of the loss and of the preference data."""

    beta: float = field(default=0.1, metadata={"help": "Strength of the KL constraint, > 0."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the sequence-KL difference in tdpo2, >= 0."})
    variant: str = field(default="tdpo2", metadata={"help": "Loss: tdpo2, tdpo1 or dpo."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of prompt and response together, at most."})
    max_prompt_length: int = field(default=512, metadata={"help": "Tokens of the prompt, at most; its end is kept."})
    disable_dropout: bool = field(
        default=True, metadata={"help": "Switch the policy's dropout off, so that it is compared as the reference is."}
    )
    logits_budget: int | None = field(
        default=None, metadata={"help": "Bytes that logits and other temporaries of the loss may take."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Kept False: the collator reads columns that the model doesn't know."}
    )

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise ValueError(f"variant is {self.variant!r}; allowed are {', '.join(VARIANTS)}")
        check_loss_options(self.beta, self.alpha, "tdpo2" if self.variant == "dpo" else self.variant)
        if not 0 < self.max_prompt_length < self.max_length:
            raise ValueError(
                f"max_prompt_length is {self.max_prompt_length}; it must be positive and below max_length, "
                f"{self.max_length}"
            )
        super().__post_init__()

    def objective(self):
        """The pairwise loss that these options name, as `tdpo_ext.linear_preference_loss` takes it."""
        if self.variant == "dpo":
            return functools.partial(dpo_loss, beta=self.beta)
        return functools.partial(tdpo_loss, beta=self.beta, alpha=self.alpha, variant=self.variant)
