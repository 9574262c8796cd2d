"""What the audit before the first step takes, beside a step, and what it finds on pretrained models.

    python benchmarks/bench_audit.py [--steps 3]

SmolLM2 and, where its packages are installed, Gemma 3 (see real_models.py); LoRA against the policy as it starts, and
the whole policy against a reference that differs from it, in float32 and with bf16. The pairs are IMDb reviews, cut at
192 tokens. Results go to benchmarks/results/bench_audit.json. Takes about five minutes on two cores.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import real_models
import torch
from common import save, text_table
from datasets import Dataset
from peft import LoraConfig
from tdpo import TDPOConfig, TDPOTrainer
from transformers import TrainerCallback

PAIRS = 16
LENGTHS = {"max_length": 192, "max_prompt_length": 64}
DEVICE = {"use_cpu": not torch.cuda.is_available()}  # bf16 on a CPU must be asked for


class StepTimes(TrainerCallback):
    """The seconds of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *arguments: Any, **others: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **others: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)


def pairs() -> Dataset:
    texts = real_models.review_texts(1500, 2500)[: 2 * PAIRS]
    return Dataset.from_list(
        [
            {"prompt": text[:200], "chosen": text[200:], "rejected": other[200:]}
            for text, other in zip(texts[:PAIRS], texts[PAIRS:])
        ]
    )


def measured(name: str, reference: str, bf16: bool, steps: int) -> dict[str, Any]:
    model, tokenizer = real_models.load(name, torch.float32)
    models: dict[str, Any] = {"model": model}
    if reference == "another model":
        models["ref_model"] = real_models.load(name, torch.float32).model
        real_models.perturb(models["ref_model"], 0.02)
    else:
        models["peft_config"] = LoraConfig(task_type="CAUSAL_LM", r=16, target_modules="all-linear")
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": steps, "per_device_train_batch_size": 2, "save_strategy": "no", "report_to": "none"}
        args = TDPOConfig(output_dir=folder, bf16=bf16, audit="never", **options, **LENGTHS, **DEVICE)
        trainer = TDPOTrainer(**models, args=args, train_dataset=pairs(), processing_class=tokenizer)
        report, times = trainer.audit(), StepTimes()
        trainer.add_callback(times)
        trainer.train()
    step = statistics.median(times.seconds)
    return {
        "model": name,
        "reference": reference,
        "precision": "bf16" if bf16 else "float32",
        "log-probabilities": report.logps,
        "KL": report.kl,
        "audit, seconds": report.seconds,
        "step, seconds": step,
        "audit / step": report.seconds / step,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3)
    steps = parser.parse_args().steps
    rows = [
        measured(name, reference, bf16, steps)
        for name in real_models.available()
        for reference in ("the policy as it starts", "another model")
        for bf16 in (False, True)
    ]
    print(text_table(rows, list(rows[0])))
    save("bench_audit", {"rows": rows})


if __name__ == "__main__":
    main()
