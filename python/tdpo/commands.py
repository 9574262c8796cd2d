"""The commands train, evaluate and cache-reference."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from . import checkpoints
from .data import load_preferences, padding_token, tokenize_preferences
from .options import Options, parse_options, require
from .reference_cache import cache_reference
from .trainer import TDPOTrainer


def _trainer(options: Options, *, train_dataset: Dataset | None, eval_dataset: Dataset | None) -> TDPOTrainer:
    models = options.models
    return TDPOTrainer(
        models.load(require(models, "model")),
        None if models.ref_model is None else models.load(models.ref_model),
        options.training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=models.tokenizer(),
        peft_config=models.adapters(),
    )


def train(arguments: list[str]) -> None:
    """Trains, resuming from the last checkpoint in output_dir if there is one, and saves the model there."""
    description = "Trains a policy on preference pairs; run again, it resumes from its last checkpoint."
    options = parse_options("train", description, arguments)
    models, data, args = options
    require(models, "model")
    preferences = load_preferences(require(data, "dataset"), data.split)
    evaluation = None if data.eval_dataset is None else load_preferences(data.eval_dataset, data.eval_split)
    trainer = _trainer(options, train_dataset=preferences, eval_dataset=evaluation)
    interrupted = bool(checkpoints.checkpoints_of(args.output_dir))
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint or interrupted)
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
    options = parse_options("evaluate", description, arguments)
    models, data, args = options
    require(models, "model")
    require(models, "ref_model")
    evaluation = load_preferences(require(data, "eval_dataset"), data.eval_split)
    trainer = _trainer(options, train_dataset=None, eval_dataset=evaluation)
    metrics = trainer.evaluate()
    if args.should_save:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=1))
        print(json.dumps(metrics, indent=1))


def cache(arguments: list[str]) -> None:
    """Runs the reference over the data and caches its hidden states for training with `--precompute_reference`."""
    description = (
        "Runs the reference over the preferences and caches its hidden states in reference_cache (default: "
        "reference-cache in output_dir), from which training with --precompute_reference reads them. Interrupted, it "
        "resumes when run again."
    )
    models, data, args = parse_options("cache-reference", description, arguments)
    model_name = require(models, "model")
    splits = {"train": (require(data, "dataset"), data.split)}
    if data.eval_dataset is not None:
        splits["eval"] = (data.eval_dataset, data.eval_split)
    tokenizer = models.tokenizer()
    model = models.load(models.ref_model or model_name).to(args.device)
    for name, (source, split) in splits.items():
        tokens = tokenize_preferences(
            load_preferences(source, split), tokenizer, args.max_length, args.max_prompt_length, args.overlong
        )
        folder = args.reference_folder / name
        cache_reference(folder, model, tokens, padding_token(tokenizer), args.reference_dtype)
        print(f"cached {len(tokens)} rows in {folder}")
