"""What the commands train, evaluate and cache-reference do; each reads top to bottom."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from . import checkpoints
from .config import TDPOConfig
from .data import load_preferences, padding_token, tokenize_preferences
from .options import DataOptions, ModelOptions, needed, parse_options
from .reference import cache_reference
from .trainer import TDPOTrainer

KINDS: list[type] = [ModelOptions, DataOptions, TDPOConfig]


def _trainer(models: ModelOptions, args: TDPOConfig, train: Any, evals: Any) -> TDPOTrainer:
    return TDPOTrainer(
        models.load(models.model or ""),
        None if models.ref_model is None else models.load(models.ref_model),
        args,
        train_dataset=train,
        eval_dataset=evals,
        processing_class=AutoTokenizer.from_pretrained(models.model, trust_remote_code=models.trust_remote_code),
        peft_config=models.adapters(),
    )


def train(arguments: list[str]) -> None:
    """Trains, going on from the last checkpoint in output_dir where there is one, and saves the model there."""
    description = "Trains a policy on preference pairs; called again, it goes on from its last checkpoint."
    models, data, args = parse_options("train", KINDS, description, arguments)
    needed(models, "model")
    needed(data, "dataset")
    preferences = load_preferences(data.dataset, data.split)
    evals = None if data.eval_dataset is None else load_preferences(data.eval_dataset, data.eval_split)
    trainer = _trainer(models, args, preferences, evals)
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or checkpoints.last_good(args.output_dir))
    trainer.save_model()
    trainer.save_state()
    if models.merge_adapters and args.should_save:
        merged = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
        merged.save_pretrained(Path(args.output_dir, "merged"))
        trainer.processing_class.save_pretrained(Path(args.output_dir, "merged"))
    print(f"saved {args.output_dir}")


def evaluate(arguments: list[str]) -> None:
    """Prints the metrics of a policy against a reference on preference pairs, as JSON."""
    description = "Evaluates a policy against a reference on preference pairs; prints the metrics as JSON."
    models, data, args = parse_options("evaluate", KINDS, description, arguments)
    needed(models, "model", "ref_model")
    needed(data, "eval_dataset")
    trainer = _trainer(models, args, None, load_preferences(data.eval_dataset, data.eval_split))
    metrics = trainer.evaluate()
    if args.should_save:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=1))
        print(json.dumps(metrics, indent=1))


def cache(arguments: list[str]) -> None:
    """Runs the reference over the data and keeps its hidden states, as `--precompute_reference` wants them."""
    description = (
        "Runs the reference over the preferences and keeps its hidden states in reference_cache (default: "
        "reference-cache in output_dir), where training with --precompute_reference finds them. Called again, it goes "
        "on where it was interrupted."
    )
    models, data, args = parse_options("cache-reference", KINDS, description, arguments)
    needed(models, "model")
    needed(data, "dataset")
    tokenizer = AutoTokenizer.from_pretrained(models.model, trust_remote_code=models.trust_remote_code)
    model = models.load(models.ref_model or models.model).to(args.device)
    folder = args.reference_folder
    splits = {"train": (data.dataset, data.split)}
    if data.eval_dataset is not None:
        splits["eval"] = (data.eval_dataset, data.eval_split)
    for name, (source, split) in splits.items():
        tokens = tokenize_preferences(
            load_preferences(source, split), tokenizer, args.max_length, args.max_prompt_length, args.overlong
        )
        cache_reference(folder / name, model, tokens, padding_token(tokenizer), args.reference_dtype)
        print(f"cached {len(tokens)} rows in {folder / name}")
