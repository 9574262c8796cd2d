"""What `tdpo_ext.estimate` and `tdpo memory` say, against measured peaks.

    python benchmarks/bench_memory.py [--parts loss steps] [--trainings NAME ...]

loss: peak resident memory of a second call of the fused loss, forward and backward, beyond its arguments and gradients,
against the bytes of its plan; and of the published arithmetic, against seven float32 tensors. Heads of SmolLM2 (its
weights; V 49,152, D 576) and Gemma 3 270M (its sizes with random weights; V 262,144, D 640).

steps: two steps of a training of SmolLM2 (its weights) or Gemma 3 270M (its sizes with random weights), in a process of
its own: the peak beyond the models that it has loaded against what `tdpo memory` says of the same options, activations
being a rough part of it. A training of a tiny model comes first, so that modules which the trainer imports late are not
counted. With --trainings, the peaks of the others stay as they were measured, beside estimates that are made again:
bfloat16 takes long on processors that don't multiply it.

The script starts itself again with settings by which glibc gives blocks of 1 MiB and more back to the system when they
are freed: otherwise it keeps smaller ones than 32 MiB for later.

Results go to benchmarks/results/bench_memory.json, part by part.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import real_models
import torch
import torch.nn.functional as F
from common import RESULTS, peak_extra_bytes, save, text_table
from datasets import Dataset
from peers import published
from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

import tdpo_ext

MIB = 2**20
OBJECTIVE = functools.partial(tdpo_ext.tdpo_loss, beta=0.1)
GEMMA = {  # 270M
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
TINY = {"vocab_size": 49152, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
# Pairs, their rows, the budget (None: the default), whether the head is frozen.
CALLS = (
    (8, 256, 256 * MIB, False),
    (2, 2048, 256 * MIB, False),
    (2, 1024, None, True),
)
PUBLISHED_ROWS = 256
RETURNS_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_MMAP_MAX_": "1000000", "MALLOC_TRIM_THRESHOLD_": str(MIB)}
# Of trainings: 2 pairs of 64 and 192 tokens a batch.
SETTINGS = {"max_length": 256, "max_prompt_length": 64, "per_device_train_batch_size": 2, "shared_prompts": "never"}
STEPS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True},
    "bf16, checkpointed": {"bf16": True, "activation_checkpointing": True},
    "bf16, two batches a step": {"bf16": True, "gradient_accumulation_steps": 2},
    "LoRA, bfloat16 weights": {"lora_r": 16, "dtype": "bfloat16", "bf16": True},
    "Gemma 3, float32": {},
    "Gemma 3, float32, checkpointed": {"activation_checkpointing": True},
    "Gemma 3, LoRA, float32 weights": {"lora_r": 16, "dtype": "float32"},
}


def not_a_margin_loss(chosen: Any, rejected: Any) -> Tensor:
    """The same loss, which the planner can't defer."""
    return OBJECTIVE(chosen, rejected)


def gemma(**sizes: int) -> Gemma3ForCausalLM:
    torch.manual_seed(0)
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**GEMMA, **sizes}, architectures=["Gemma3ForCausalLM"]))


def heads() -> dict[str, Tensor]:
    """(V, D), float32."""
    smollm2 = real_models.load("smollm2", torch.float32).model
    return {
        "smollm2": smollm2.get_output_embeddings().weight.detach().clone(),
        "gemma3": gemma(num_hidden_layers=2).get_output_embeddings().weight.detach().clone(),
    }


def measure_call(weight: Tensor, pairs: int, pair_rows: int, budget: int | None, frozen: bool, margin: bool) -> dict:
    rows, (vocab, width) = pairs * pair_rows, weight.shape
    hidden, ref_hidden = (torch.randn(rows, width).to(weight.dtype) for _ in range(2))
    weight, ref_weight = weight.clone().requires_grad_(not frozen), weight.clone()
    labels, hidden = torch.randint(vocab, (rows,)), hidden.requires_grad_()

    def run() -> None:
        loss, *_ = tdpo_ext.linear_preference_loss(
            OBJECTIVE if margin else not_a_margin_loss,
            *(hidden, weight, ref_hidden, ref_weight, labels),
            row_lengths=[pair_rows // 2] * 2 * pairs,
            logits_budget=budget,
        )
        loss.backward()

    estimate = tdpo_ext.estimate(
        [pair_rows] * pairs,
        vocab=vocab,
        width=width,
        dtype=weight.dtype,
        frozen_head=frozen,
        margin_loss=margin,
        logits_budget=budget,
    )
    run()  # kernels that are compiled for the first call stay
    hidden.grad = weight.grad = None
    tdpo_ext.release_scratch()
    measured = peak_extra_bytes(run) - estimate.gradients
    return {
        "pairs": pairs,
        "pair rows": pair_rows,
        "frozen": frozen,
        "plan": str(estimate.plan).partition(":")[0],
        **compared(estimate.temporaries, measured),
    }


def measure_published(weight: Tensor) -> dict:
    vocab, width = weight.shape
    hidden = torch.randn(PUBLISHED_ROWS, width).to(weight.dtype).requires_grad_()
    labels = torch.randint(vocab, (PUBLISHED_ROWS,))

    def run() -> None:
        with torch.no_grad():
            ref_logits = F.linear(hidden, weight).to(torch.float32)
        logits = F.linear(hidden, weight).to(torch.float32)
        published(logits, ref_logits, labels)

    estimate = tdpo_ext.estimate([PUBLISHED_ROWS], vocab=vocab, width=width, dtype=weight.dtype)
    run()
    hidden.grad = weight.grad = None
    return {"pairs": 1, "pair rows": PUBLISHED_ROWS, "plan": "published", **compared(estimate.published, run)}


def compared(estimated: int, measured: Any) -> dict:
    measured = peak_extra_bytes(measured) if callable(measured) else measured
    return {"estimated_mb": estimated / MIB, "measured_mb": measured / MIB, "measured_over": measured / estimated}


def loss_part() -> list[dict]:
    results: list[dict] = []
    for dtype in (torch.bfloat16, torch.float32):  # what is loaded or allocated once
        measure_call(torch.randn(5000, 64, dtype=dtype), 4, 256, None, False, margin=True)
    for model, weight in heads().items():
        for dtype in (torch.bfloat16, torch.float32):
            case = {"model": model, "dtype": str(dtype).removeprefix("torch.")}
            for call in CALLS:
                results.append({**case, **measure_call(weight.to(dtype), *call, margin=True)})
            results.append({**case, **measure_call(weight.to(dtype), 2, 2048, 256 * MIB, False, margin=False)})
            results.append({**case, "frozen": False, **measure_published(weight.to(dtype))})
            print(text_table(results[-len(CALLS) - 2 :], list(results[0])), flush=True)
    return results


# ---- whole steps ----


def step(name: str, *, measures: bool) -> None:
    """The bytes that the report says of a training, in this process, and those of two steps of it; printed as JSON."""
    from tdpo import TDPOConfig, TDPOTrainer
    from tdpo.memory.report import report_of
    from tdpo.models.loading import load_policy, load_tokenizer, lora_config
    from tdpo.options import MemoryOptions, ModelOptions

    of_models = {key: value for key, value in STEPS[name].items() if key in ("lora_r", "dtype")}
    options = {key: value for key, value in STEPS[name].items() if key not in of_models}
    smollm2 = real_models.FOLDER / "smollm2"
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "gemma3") if name.startswith("Gemma") else smollm2
        if model != smollm2:
            gemma().save_pretrained(model)
        models = ModelOptions(model=str(model), **of_models)
        settings = {**SETTINGS, "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
        args = TDPOConfig(output_dir=folder, max_steps=2, audit="never", **{**settings, **options})
        report = report_of(models, MemoryOptions(), args)
        found = {
            "training": name,
            "estimated_mb": (report.together["tdpo"] - report.weights - report.reference) / MIB,
            "plan": report.plan.partition(":")[0],
        }

        def trainer(policy: Any) -> TDPOTrainer:
            tokenizer = load_tokenizer(ModelOptions(model=str(smollm2)))
            given = {"train_dataset": made_up_pairs(), "processing_class": tokenizer}
            return TDPOTrainer(policy, None, args, **given, peft_config=lora_config(models))

        if measures:
            trainer(LlamaForCausalLM(LlamaConfig(**TINY))).train()
            found["measured_mb"] = peak_extra_bytes(trainer(load_policy(models)).train) / MIB
            found["measured_with"] = tdpo_ext.build_info()["cpu_capability"]
    print(json.dumps(found))


def made_up_pairs() -> Dataset:
    draw = functools.partial(torch.randint, 1, 40000)
    row = {"prompt_ids": (64,), "chosen_ids": (192,), "rejected_ids": (192,)}
    return Dataset.from_list([{column: draw(size).tolist() for column, size in row.items()} for _ in range(16)])


def steps_part(before: list[dict], trainings: list[str]) -> list[dict]:
    """Measures `trainings`; of the others, the peaks of `before` are kept."""
    measured = {row["training"]: {key: row[key] for key in ("measured_mb", "measured_with")} for row in before}
    results = []
    for name in STEPS:
        asked = ["--measures"] if name in trainings else []
        if not asked and name not in measured:
            continue
        command = [sys.executable, __file__, "--step", name, *asked]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = {**measured.get(name, {}), **json.loads(done.stdout.splitlines()[-1])}
        results.append({**found, "measured_over": found["measured_mb"] / found["estimated_mb"]})
        print(text_table(results[-1:], list(results[-1])), flush=True)
    return results


def main() -> None:
    if not RETURNS_BLOCKS.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **RETURNS_BLOCKS})
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("loss", "steps")
    parser.add_argument("--parts", nargs="*", choices=parts, default=parts, help="what to measure")
    parser.add_argument("--trainings", nargs="*", choices=list(STEPS), default=list(STEPS), help="of the steps")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--measures", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        return step(arguments.step, measures=arguments.measures)
    path = Path(RESULTS / "bench_memory.json")
    results: dict = json.loads(path.read_text()) if path.exists() else {}
    if "loss" in arguments.parts:
        results.pop("machine", None)  # of steps, each says what it was measured with
        results["loss"] = loss_part()
        save("bench_memory", results)
    if "steps" in arguments.parts:
        results["steps"] = steps_part(results.get("steps", []), arguments.trainings)
        save("bench_memory", results)


if __name__ == "__main__":
    main()
