"""Short trainings by any of four trainers, watched, for the walk over all options."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from tdpo import TDPOConfig, TDPOTrainer
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import SETTINGS, make_preferences

ROWS = 24
OF_TDPO = {"max_length", "max_prompt_length"}
PLAIN = {name: value for name, value in SETTINGS.items() if name not in OF_TDPO}


@dataclass
class Watch(TrainerCallback):
    """What happens at which step."""

    logs: list[int] = field(default_factory=list)
    evaluations: list[int] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    substeps: int = 0
    norms: list[float] = field(default_factory=list)
    noise: int = 0
    deterministic: bool = False

    def on_log(self, args, state, control, logs=None, **others):
        if "loss" in logs:
            self.logs.append(state.global_step)

    def on_evaluate(self, args, state, control, **others):
        self.evaluations.append(state.global_step)

    def on_save(self, args, state, control, **others):
        self.saves.append(state.global_step)

    def on_substep_end(self, args, state, control, **others):
        self.substeps += 1

    def on_step_begin(self, args, state, control, model=None, **others):
        hooks = model.get_input_embeddings()._forward_hooks.values()
        self.noise = [getattr(hook, "__name__", "") for hook in hooks].count("neftune_post_forward_hook")
        self.deterministic = torch.are_deterministic_algorithms_enabled()

    def on_pre_optimizer_step(self, args, state, control, model=None, **others):
        squares = [p.grad.square().sum().item() for p in model.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(sum(squares)))


@dataclass
class Recorder:
    """A collator that notes which rows come, and may run out of memory."""

    collate: Any
    of_row: dict[Any, int]
    most: int | None = None
    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, examples):
        if self.most is not None and len(examples) > self.most:
            raise RuntimeError("CUDA out of memory.")
        self.batches.append([self.of_row[identity(example)] for example in examples])
        return self.collate(examples)


def identity(example: dict[str, Any]) -> Any:
    names = [name for name in ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids") if name in example]
    return tuple(tuple(torch.as_tensor(example[name]).tolist()) for name in names)


@dataclass
class Run:
    """A training that is over."""

    trainer: Trainer
    watch: Watch
    recorder: Recorder
    folder: Path
    verbosity: int
    precision: str  # accelerate's, which later trainers change
    metrics: dict[str, float] = field(default_factory=dict)
    cleared: int = 0  # how often a device's cache was

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.glob("checkpoint-*"))

    @property
    def logged(self) -> list[dict[str, float]]:
        return [entry for entry in self.trainer.state.log_history if "loss" in entry]

    def group(self, name: str) -> Any:
        return {group.get(name) for group in self.trainer.optimizer.param_groups}


def make(kind: str, folder: Path, callbacks: Any = (), **options: Any) -> Trainer:
    """A trainer that isn't trained yet: tdpo, transformers, tdpo.trl or trl."""
    rows, model = make_preferences(ROWS), make_model("llama")
    shared = {"callbacks": list(callbacks)}
    if kind == "transformers":
        plain = Dataset.from_list([{"input_ids": [1 + i] * 8, "labels": [1 + i] * 8} for i in range(ROWS)])
        args = TrainingArguments(output_dir=str(folder), **{**PLAIN, **options})
        return Trainer(model, args, train_dataset=plain, eval_dataset=plain.select(range(8)), **shared)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    shared |= {"train_dataset": rows, "eval_dataset": rows.select(range(8)), "processing_class": tokenizer}
    if kind == "tdpo":
        args = TDPOConfig(output_dir=str(folder), **{**SETTINGS, "audit": "never", **options})
        return TDPOTrainer(model, make_model("llama", 1), args, **shared)
    import trl
    from tdpo.trl import TDPOTrainer as TRLsTDPOTrainer

    chosen = {"bf16": False, "max_length": 40, **{k: v for k, v in PLAIN.items() if k not in OF_TDPO}, **options}
    args = trl.DPOConfig(output_dir=str(folder), **chosen)
    if kind == "trl":
        return trl.DPOTrainer(model, make_model("llama", 1), args, **shared)
    return TRLsTDPOTrainer(model, make_model("llama", 1), args, audit="never", **shared)


def watched(kind: str, folder: Path, *, most: int | None = None, callbacks: Any = (), **options: Any) -> Run:
    """A trainer as `make` makes it, its collator and its steps recorded; `most`: rows that fit a batch."""
    before = transformers.logging.get_verbosity()
    watch = Watch()
    trainer = make(kind, folder, [watch, *callbacks], **options)
    rows = {identity(example): i for i, example in enumerate(trainer.train_dataset)}
    trainer.data_collator = recorder = Recorder(trainer.data_collator, rows, most)
    run = Run(
        trainer, watch, recorder, folder, transformers.logging.get_verbosity(), trainer.accelerator.mixed_precision
    )
    transformers.logging.set_verbosity(before)
    return run


def trained(kind: str, folder: Path, *, resume: bool = False, **options: Any) -> Run:
    """Such a trainer after its training."""
    run = watched(kind, folder, **options)
    run.metrics = run.trainer.train(resume_from_checkpoint=resume or None).metrics
    return run
