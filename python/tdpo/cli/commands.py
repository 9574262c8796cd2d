"""The commands train, evaluate and cache-reference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled

from ..config import TDPOConfig
from ..data.load import load_preferences
from ..data.tokenize import padding_token, tokenize_preferences
from ..files import read_json
from ..models.checks import check_model
from ..models.loading import load_policy, load_reference, load_tokenizer, lora_config
from ..models.sizes import check_token_ids
from ..options import ModelOptions, require
from ..precision import autocast
from ..reference.cache import cache_reference
from ..runs import checkpoints
from ..trainer import TDPOTrainer
from .parse import Options


def _trainer(options: Options, *, train_dataset: Dataset | None, eval_dataset: Dataset | None) -> TDPOTrainer:
    models = options.models
    _ = options.training.device  # sets up the processes, among which DeepSpeed may partition what is loaded
    return TDPOTrainer(
        load_policy(models),
        load_reference(models),
        options.training,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer(models),
        peft_config=lora_config(models),
    )


def train(options: Options) -> None:
    """Trains, resuming from the last checkpoint in output_dir if there is one, and saves the model there.

    A finished run changes nothing.
    """
    models, data, args = options
    require(models, "model")
    if models.merge_adapters and models.lora_r == 0:
        raise ValueError("merge_adapters is True, but there are no adapters to merge; set lora_r too")
    if models.merge_adapters and is_deepspeed_zero3_enabled():
        raise ValueError("merge_adapters is True, but ZeRO-3 partitions every model that is loaded: merge afterwards")
    out = Path(args.output_dir)
    interrupted = bool(checkpoints.checkpoints_of(out))
    resume = _checkpoint_wanted(args, interrupted)
    preferences = load_preferences(require(data, "dataset"), data.split)
    evaluation = None if data.eval_dataset is None else load_preferences(data.eval_dataset, data.eval_split)
    trainer = _trainer(options, train_dataset=preferences, eval_dataset=evaluation)
    trainer.data_name = data.dataset
    saved = _finished_without_checkpoints(trainer) if not interrupted else 0
    if not saved:
        trainer.train(resume_from_checkpoint=resume)
        saved = trainer.was_finished and _saved_steps(out) == trainer.state.global_step and trainer.state.global_step
    if saved:
        print(f"{out} holds a finished run of {saved} steps: nothing was trained or changed")
        return
    trainer.save_model()
    trainer.save_state()
    if not args.should_save:
        return
    trainer.record.write(out)
    if models.merge_adapters:
        _save_merged(models, out)
        trainer.processing_class.save_pretrained(out / "merged")
    print(f"saved {out}")


def _checkpoint_wanted(args: TDPOConfig, interrupted: bool) -> str | bool:
    """A checkpoint's path, True for the newest, or False for none.

    Raises:
        ValueError: none is wanted, but output_dir holds some, which the run would overwrite.
    """
    wanted: str | bool | None = args.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "true":
        return interrupted if wanted is None else True
    if str(wanted).lower() != "false":
        return wanted
    if interrupted:
        raise ValueError(f"resume_from_checkpoint is false, but output_dir, {args.output_dir}, holds checkpoints")
    return False


def _save_merged(models: ModelOptions, out: Path) -> None:
    """Merges the saved adapters into the policy as it started, in its own precision: never into 4-bit weights."""
    from peft import PeftModel

    base = load_policy(replace(models, load_in_4bit=False, tp_plan=None))
    PeftModel.from_pretrained(base, str(out)).merge_and_unload().save_pretrained(out / "merged")


def _saved_steps(out: Path) -> int:
    """The steps of the run whose model was saved in a folder last; 0 if there is none."""
    state = out / "trainer_state.json"
    return read_json(state)["global_step"] if state.is_file() else 0


def _finished_without_checkpoints(trainer: TDPOTrainer) -> int:
    """The steps of a finished run that left no checkpoints; 0 if there is none.

    Raises:
        ValueError: it is another run, or one to which steps would have to be added.
    """
    out, steps = Path(trainer.args.output_dir), trainer.total_steps()
    saved = _saved_steps(out)
    if not saved or trainer.args.resume_anyway:
        return 0
    trainer.record.check(out, anyway=False)
    if saved < steps:
        raise ValueError(
            f"output_dir is {out}, which holds a run of {saved} steps without checkpoints, so it can't be continued to "
            f"{steps}; give another output_dir"
        )
    return saved


def evaluate(options: Options) -> None:
    """Prints the metrics of a policy against a reference on preference pairs, as JSON."""
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


def cache(options: Options) -> None:
    """Runs the reference over the data and caches its hidden states for training with `--precompute_reference`."""
    models, data, args = options
    require(models, "model")
    splits = {"train": (require(data, "dataset"), data.split)}
    if data.eval_dataset is not None:
        splits["eval"] = (data.eval_dataset, data.eval_split)
    tokenizer = load_tokenizer(models)
    reference = load_reference(models)
    model = (load_policy(models) if reference is None else reference).to(args.device)
    argument = "model" if reference is None else "ref_model"
    with autocast(args):
        check_model(argument, model, args, tokenizer)
    for name, (source, split) in splits.items():
        tokens = tokenize_preferences(
            load_preferences(source, split), tokenizer, args.max_length, args.max_prompt_length, args.overlong
        )
        check_token_ids(tokens, **{argument: model})
        folder = args.reference_folder / name
        with autocast(args):
            cache_reference(folder, model, tokens, padding_token(tokenizer), args.reference_dtype)
        print(f"cached {len(tokens)} rows in {folder}")
