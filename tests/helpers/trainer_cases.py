"""A small preference dataset, a trainer on tiny models, and subprocesses that use them, for the trainer's tests."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tdpo import TDPOConfig, TDPOTrainer

from helpers.device import USE_CPU
from helpers.model_families import make_model, make_tokenizer

SETTINGS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": USE_CPU,
    "disable_tqdm": True,
    "max_length": 40,
    "max_prompt_length": 16,
    "save_strategy": "no",
}
FOUR_STEPS = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}  # with a checkpoint at half-way


def make_preferences(rows=24):
    return Dataset.from_list(
        [
            {
                "prompt": "the film was" + " really" * (i % 3),
                "chosen": " great" + " good" * (i % 4),
                "rejected": " bad" + " awful" * (i % 5),
            }
            for i in range(rows)
        ]
    )


def write_home(folder, **options):
    """What commands read: the folder model, data.jsonl, and config.yaml, which names them and has other options."""
    make_model("llama").save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    make_preferences().to_json(str(folder / "data.jsonl"))
    config = {
        "model": str(folder / "model"),
        "dataset": str(folder / "data.jsonl"),
        "max_length": 40,
        "max_prompt_length": 16,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": USE_CPU,
        "learning_rate": 1e-3,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **options}))


def make_trainer(
    path,
    model=None,
    ref_model=None,
    *,
    train_dataset=None,
    eval_dataset=None,
    peft_config=None,
    objective=None,
    **options,
):
    """A trainer of `model` (a GPT-2 by default) on `make_preferences()`; `options` are those of TDPOConfig."""
    preferences = make_preferences()
    return TDPOTrainer(
        model or make_model("gpt2"),
        ref_model,
        TDPOConfig(output_dir=str(path), **{**SETTINGS, **options}),
        train_dataset=train_dataset or preferences,
        eval_dataset=preferences.select(range(8)) if eval_dataset is None else eval_dataset,
        processing_class=make_tokenizer(),
        peft_config=peft_config,
        objective=objective,
    )


def with_trained_adapters(model, **options):
    """A policy with adapters as if they had been trained before."""
    torch.manual_seed(1)
    config = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False, **options}
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))


@torch.no_grad()
def change_what_trains(model):
    """Changes trainable parameters, as training does, and always in the same way."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_python(*arguments, cwd, environment=None):
    """Runs `python ARGUMENTS...`; `helpers` can be imported there.

    `cwd` must not be the source root, where Python would import the source tree instead of the installed package.
    """
    tests = Path(__file__).parent.parent
    paths = [str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **(environment or {})}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=variables, cwd=cwd)
