"""The options of the demo. Free of torch, which the command line loads late."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..options import option

METHODS = ("dpo", "tdpo1", "tdpo2")
SMOLLM2, FROM_SCRATCH = "smollm2", "scratch"
# Defaults of the small model that is trained from scratch, where they are others than those of a pretrained model.
SCRATCH: dict[str, Any] = {
    "lora_r": 0,
    "pretrain_steps": 450,
    "prompts": 1200,
    "prompt_tokens": 5,
    "steps": 80,
    "eval_every": 20,
    "eval_prompts": 256,
    "batch_pairs": 32,
    "learning_rate": 5e-4,
}
_MAY_BE_ZERO = ("seed", "lora_r", "pretrain_steps")


class Method(NamedTuple):
    """A loss and its numbers."""

    variant: str
    beta: float
    alpha: float


@dataclass(frozen=True)
class DemoSettings:
    """Everything that determines the demo's results.

    Raises:
        ValueError: a setting out of range, named in the message.
    """

    out: str = option("out/demo", "directory for models, data, results and the plot")
    model: str = option(
        SMOLLM2,
        "where all methods start: smollm2 (SmolLM2-135M-Instruct), scratch (a small GPT-2 that is trained first, for "
        "tests and machines without the package) or the folder of a model of your own",
    )
    seed: int = option(0, "seed of all random numbers")
    reviews: int = option(15_000, "IMDb reviews to use, of the 25,000 that there are")
    methods: list[str] = option(list(METHODS), "losses to compare: dpo, tdpo1, tdpo2")  # noqa: RUF009
    lora_r: int = option(16, "rank of the LoRA adapters that are trained; 0 trains the whole model")
    pretrain_steps: int = option(0, "steps of 32 x 64 tokens for the model from scratch")
    prompts: int = option(170, "prompts for which preference pairs are sampled")
    prompt_tokens: int = option(8, "tokens of a prompt, which is the beginning of a sentence")
    samples: int = option(4, "responses sampled per prompt; the best and the worst make a pair")
    response_tokens: int = option(16, "tokens of a sampled response")
    steps: int = option(20, "training steps of each method")
    eval_every: int = option(10, "steps between evaluations and checkpoints")
    eval_prompts: int = option(256, "held-out prompts that every policy continues at each evaluation")
    kl_prompts: int = option(64, "of them, those on whose responses the KL is measured (it is a sum of expectations)")
    batch_pairs: int = option(8, "preference pairs per step")
    learning_rate: float = option(2e-3, "learning rate of each method")
    beta: float = option(0.1, "strength of the KL constraint")
    alpha: float = option(0.5, "weight of the sequence-KL difference in tdpo2")

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"methods holds {', '.join(unknown)}; allowed are {', '.join(METHODS)}")
        if not self.methods:
            raise ValueError("methods is empty; at least one is needed")
        for name, value in asdict(self).items():
            if not isinstance(value, (int, float)):
                continue
            may_be_zero = name in _MAY_BE_ZERO
            if not math.isfinite(value) or value < 0 or (value == 0 and not may_be_zero):
                raise ValueError(f"{name} is {value}; it must {'not be negative' if may_be_zero else 'be positive'}")
        if self.samples < 2:
            raise ValueError("samples is 1; it must be at least 2, as a pair has two responses")
        if (self.model == FROM_SCRATCH) != (self.pretrain_steps > 0):
            raise ValueError(
                f"pretrain_steps is {self.pretrain_steps} and model is {self.model}; it must be positive for "
                f"{FROM_SCRATCH}, and 0 for a model that is trained already"
            )
        if self.model not in (SMOLLM2, FROM_SCRATCH) and not Path(self.model).is_dir():
            raise ValueError(f"model is {self.model}; {SMOLLM2}, {FROM_SCRATCH} or an existing folder is needed")

    def method(self, variant: str) -> Method:
        """A loss with the demo's numbers."""
        return Method(variant, self.beta, self.alpha)
