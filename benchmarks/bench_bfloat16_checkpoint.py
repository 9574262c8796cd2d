"""What training makes of a bfloat16 checkpoint, as most are: SmolLM2, with `tdpo train`.

    python benchmarks/bench_bfloat16_checkpoint.py [--steps 32]

* training: the share of weights that have another value afterwards, and the loss, where weights are trained in the
  checkpoint's precision (`--dtype bfloat16`) and by default (float32): with the command's default options, and with the
  optimizer of examples/full.yaml, without its warm-up, which is longer than these runs.
* start: loss and KL before the first step, which should be log 2 and 0, of a float32 policy beside a reference in the
  checkpoint's precision, and beside one in float32, as the command loads it.

The pairs are beginnings of 8 IMDb reviews, continued as they go on (chosen) and as others do (rejected); they come
round every 4 steps, so that the loss shows what has been learnt. Results go to
benchmarks/results/bench_bfloat16_checkpoint.json. Takes some minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import real_models
import torch
import yaml
from common import save, text_table
from datasets import Dataset
from safetensors.torch import load_file
from tdpo.cli import main as tdpo
from transformers import AutoModelForCausalLM, AutoTokenizer

PAIRS, BATCH, LAST_STEPS = 8, 2, 8
LENGTHS = {"max_length": 64, "max_prompt_length": 16}
EXAMPLE = Path(__file__).parents[1] / "examples" / "full.yaml"
DEVICE = {"use_cpu": not torch.cuda.is_available()}  # bf16 on a CPU must be asked for
OF_OPTIMIZER = ("optim", "learning_rate", "lr_scheduler_type", "bf16")


def write_inputs(home: Path) -> None:
    """A bfloat16 checkpoint, in `model`, and `data.jsonl`."""
    model, tokenizer = real_models.load("smollm2", torch.bfloat16)
    model.save_pretrained(home / "model")
    tokenizer.save_pretrained(home / "model")
    texts = real_models.review_texts(400, 400)[: 2 * PAIRS]
    rows = [
        {"prompt": text[:60], "chosen": text[60:], "rejected": other[60:]}
        for text, other in zip(texts[:PAIRS], texts[PAIRS:])
    ]
    Dataset.from_list(rows).to_json(str(home / "data.jsonl"))


def optimizers() -> dict[str, dict[str, Any]]:
    """The options of each, by its name."""
    example = yaml.safe_load(EXAMPLE.read_text())
    return {"default options": {}, "examples/full.yaml": {name: example[name] for name in OF_OPTIMIZER}}


def trained(home: Path, out: Path, steps: int, **options: Any) -> dict:
    """A run of `tdpo train`: what became of the weights, and its losses."""
    given = {"model": home / "model", "dataset": home / "data.jsonl", "output_dir": out, **LENGTHS, **DEVICE}
    given |= {
        "max_steps": steps,
        "per_device_train_batch_size": BATCH,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    status = tdpo(["train", *(f"--{name}={value}" for name, value in {**given, **options}.items())])
    if status != 0:
        raise SystemExit(f"tdpo train ended with {status}")
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {
        "changed": share_of_changed(home / "model", out),
        "first_loss": losses[0],
        "last_loss": sum(losses[-LAST_STEPS:]) / LAST_STEPS,
    }


def share_of_changed(start: Path, end: Path) -> float:
    before, after = (load_file(folder / "model.safetensors") for folder in (start, end))
    changed = sum((weights.float() != after[name].float()).sum().item() for name, weights in before.items())
    return changed / sum(weights.numel() for weights in before.values())


def at_start(home: Path, out: Path) -> list[dict]:
    """Losses and KLs before the first step, by what computes and by the reference's precision."""
    from tdpo import TDPOConfig, TDPOTrainer, load_preferences

    rows = []
    for bf16 in (False, True):
        for reference in (torch.bfloat16, torch.float32):
            models = [AutoModelForCausalLM.from_pretrained(home / "model", dtype=d) for d in (torch.float32, reference)]
            trainer = TDPOTrainer(
                *models,
                args=TDPOConfig(output_dir=str(out), bf16=bf16, report_to=[], disable_tqdm=True, **LENGTHS, **DEVICE),
                eval_dataset=load_preferences(str(home / "data.jsonl"), "train"),
                processing_class=AutoTokenizer.from_pretrained(home / "model"),
            )
            metrics = trainer.evaluate()
            found = {name: metrics[f"eval_{name}"] for name in ("loss", "kl/chosen")}
            rows.append({"computes in": "bfloat16" if bf16 else "float32", "reference": str(reference)[6:], **found})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=32, help="optimizer steps of every run")
    steps = parser.parse_args().steps
    results: dict[str, Any] = {"steps": steps, "pairs": PAIRS, "batch": BATCH, "last_steps": LAST_STEPS, "training": []}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        write_inputs(home)
        results["start"] = at_start(home, home / "start")
        for optimizer, options in optimizers().items():
            for dtype in ("bfloat16", "auto"):
                out = home / f"{optimizer.replace('/', '-')}-{dtype}"
                run = trained(home, out, steps, dtype=dtype, **options)
                results["training"].append({"options": optimizer, "dtype": dtype, **run})
                path = save("bench_bfloat16_checkpoint", results)
    for part in ("training", "start"):
        print(text_table(results[part], list(results[part][0])))
    print(f"saved {path}")


if __name__ == "__main__":
    main()
