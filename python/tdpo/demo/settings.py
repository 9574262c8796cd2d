"""The options of the demo. Free of torch, which the command line loads late."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..fields import option

METHODS = ("dpo", "tdpo1", "tdpo2")


@dataclass(frozen=True)
class DemoSettings:
    """Everything that determines the demo's results.

    Raises:
        ValueError: a setting out of range, named in the message.
    """

    out: str = option("out/demo", "directory for models, data, results and the plot")
    seed: int = option(0, "seed of all random numbers")
    reviews: int = option(15_000, "IMDb reviews to use, 25,000 at most")
    methods: tuple[str, ...] = option(METHODS, "losses to compare: dpo, tdpo1, tdpo2")
    pretrain_steps: int = option(450, "steps of 32 x 64 tokens for the GPT-2 trained from scratch")
    prompts: int = option(1200, "prompts for which preference pairs are sampled")
    samples: int = option(4, "responses sampled per prompt; the best and the worst make a pair")
    response_tokens: int = option(24, "tokens of a sampled response")
    steps: int = option(80, "training steps of each method")
    eval_every: int = option(20, "steps between evaluations and checkpoints")
    eval_prompts: int = option(256, "prompts sampled at each evaluation")
    batch_pairs: int = option(32, "preference pairs per step")
    learning_rate: float = option(5e-4, "learning rate of each method")
    beta: float = option(0.1, "strength of the KL constraint")
    alpha: float = option(0.5, "weight of the sequence-KL difference in tdpo2")

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"methods holds {', '.join(unknown)}; allowed are {', '.join(METHODS)}")
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and name != "seed" and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.samples < 2:
            raise ValueError("samples is 1; it must be at least 2, as a pair has two responses")
