"""The knobs of the demo. No torch here: the command line reads it first."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

METHODS = ("dpo", "tdpo1", "tdpo2")


def _knob(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class DemoSettings:
    """Everything that decides the demo's results."""

    out: str = _knob("out/demo", "directory for models, data, results and the picture")
    seed: int = _knob(0, "seed of everything that is drawn")
    reviews: int = _knob(15_000, "IMDb reviews to use, 25,000 at most")
    methods: tuple[str, ...] = _knob(METHODS, "losses to compare: dpo, tdpo1, tdpo2")
    pretrain_steps: int = _knob(450, "steps of 32 x 64 tokens for the GPT-2 trained from scratch")
    prompts: int = _knob(1200, "prompts for which preference pairs are sampled")
    samples: int = _knob(4, "responses sampled per prompt; the best and the worst make a pair")
    response_tokens: int = _knob(24, "tokens of a sampled response")
    steps: int = _knob(80, "training steps of each method")
    eval_every: int = _knob(20, "steps between evaluations and checkpoints")
    eval_prompts: int = _knob(256, "prompts sampled at each evaluation")
    batch_pairs: int = _knob(32, "preference pairs per step")
    learning_rate: float = _knob(5e-4, "learning rate of each method")
    beta: float = _knob(0.1, "strength of the KL constraint")
    alpha: float = _knob(0.5, "weight of the sequence-KL difference in tdpo2")

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in METHODS]
        if unknown:
            raise ValueError(f"methods holds {', '.join(unknown)}; allowed are {', '.join(METHODS)}")
        for name, value in asdict(self).items():
            if isinstance(value, (int, float)) and name != "seed" and value <= 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.samples < 2:
            raise ValueError("samples is 1; a pair needs two responses")
