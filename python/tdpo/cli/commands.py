"""The commands train, data, memory, evaluate, audit and cache-reference."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ..config import TDPOConfig
from ..data.forms import column_mapping
from ..data.load import load_preferences
from ..data.show import View, data_text, legend_text
from ..data.tokenize import check_row, padding_token, tokenize_rows
from ..files import file_digest, read_json, whole_folder, write_json
from ..memory.report import report_of
from ..models.checks import check_model
from ..models.loading import (
    load_adapted_model,
    load_policy,
    load_reference,
    load_tokenizer,
    lora_config,
    merges_adapters,
    trains_adapters,
)
from ..models.merging import merge_adapters
from ..models.sizes import embedded_ids
from ..option_checks import check_merging
from ..options import REFERENCE_FREE, DataOptions, MemoryOptions, ModelOptions, ShowOptions, require
from ..precision import autocast
from ..progress import shows_bars
from ..reference.cache import cache_reference
from ..runs.checkpoints import checkpoints_of
from ..runs.ending import show_log
from ..runs.lock import only_run_in
from ..runs.resume import finished_steps
from ..runs.stopping import Interrupted, Terminated
from ..tokenization import Tokenization
from ..trainer import TDPOTrainer
from .parse import Options

MERGED = "merged"  # in output_dir
_ADAPTERS, _MADE_OF = "adapter_model.safetensors", "merged_from.json"  # which says what adapters a merged model has
_OF_A_STREAM = 1000  # rows that `tdpo data` reads


def _trainer(
    options: Options,
    *,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | None,
    saves_start: bool = False,
) -> TDPOTrainer:
    models, _, args = options
    for data in (train_dataset, eval_dataset):
        if isinstance(data, Dataset) and data.column_names:  # what they lack is said before the models are loaded
            columns = column_mapping(args.columns)
            check_row(dict.fromkeys(data.column_names), columns, args.trained_objective().token_columns)
    _ = args.device  # sets up the processes, among which DeepSpeed may partition what is loaded
    policy = load_policy(models)
    if saves_start and merges_adapters(models):
        _save_start(policy, Path(args.output_dir, "start"), args)
    return TDPOTrainer(
        policy,
        load_reference(models),
        args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_tokenizer(models),
        peft_config=lora_config(models),
    )


def _training_data(options: Options) -> Dataset | IterableDataset:
    data = options.data
    return load_preferences(require(data, "dataset"), data.split, data.streaming)


def _evaluation_data(options: Options) -> Dataset | IterableDataset:
    data = options.data
    return load_preferences(require(data, "eval_dataset"), data.eval_split, data.streaming)


def train(options: Options) -> None:
    """Trains, resuming from the last checkpoint in output_dir if there is one, and saves the model there.

    A finished run changes nothing; what it lacks of `merge_adapters` is made, and with `push_to_hub` it is uploaded.
    """
    models, _, args = options
    check_merging(models, trains_adapters=trains_adapters(models))
    if models.merge_adapters and is_deepspeed_zero3_enabled():
        raise ValueError("merge_adapters is True, but ZeRO-3 partitions every model that is loaded: merge afterwards")
    _ = args.device  # sets up the processes
    with only_run_in(args.output_dir):
        _train(options)


def _train(options: Options) -> None:
    models, data, args = options
    out = Path(args.output_dir)
    interrupted = bool(checkpoints_of(out))
    resume = _checkpoint_wanted(args, interrupted)
    preferences = _training_data(options)
    evaluation = None if data.eval_dataset is None else _evaluation_data(options)
    trainer = _trainer(options, train_dataset=preferences, eval_dataset=evaluation, saves_start=True)
    trainer.data_name = data.dataset
    if resume is True or not interrupted:
        finished = finished_steps(args, trainer.record, trainer.total_steps())
        if finished:
            merged = _merge(trainer, models)
            changed = f"its adapters were merged, to {out / MERGED}" if merged else "nothing was trained or changed"
            if args.should_save:
                print(f"{out} holds a finished run of {finished} steps: {changed}")
            _publish(trainer)
            return
    try:
        trainer.train(resume_from_checkpoint=resume)
    except (Interrupted, Terminated):
        _show_log(trainer)
        raise
    trainer.save_model(_internal_call=True)  # uploaded below, with the rest
    if args.should_save:
        trainer.record.write(out)  # before what says that the run is finished
    trainer.save_state()
    _merge(trainer, models)
    if args.should_save:
        print(f"saved {out}")
    if _show_log(trainer):
        trainer.create_model_card()  # which shows the picture
    _publish(trainer)


def _show_log(trainer: TDPOTrainer) -> bool:
    """Whether there is a picture of the run's log now."""
    args = trainer.args
    return args.should_save and show_log(trainer.state, args, trainer.callback_handler.callbacks)


def _publish(trainer: TDPOTrainer) -> None:
    if trainer.args.push_to_hub:
        trainer.upload()


def _save_start(policy: Any, folder: Path, args: TDPOConfig) -> None:
    """Saves a policy that is not the checkpoint it was read from, so that adapters trained on it have a base."""
    with args.main_process_first(desc="saving the policy as it starts"):
        if args.should_save and not checkpoints_of(folder.parent):  # otherwise it is there
            with whole_folder(folder) as written:
                policy.save_pretrained(written)
    policy.name_or_path = policy.config._name_or_path = str(folder)


def _checkpoint_wanted(args: TDPOConfig, interrupted: bool) -> str | bool:
    """A checkpoint's path, True for the newest, or False for none.

    Raises:
        ValueError: none is wanted, but output_dir holds some, which the run would overwrite.
    """
    wanted: Any = args.resume_from_checkpoint
    if wanted is None:
        return interrupted
    if wanted is False and interrupted:
        raise ValueError(f"resume_from_checkpoint is false, but output_dir, {args.output_dir}, holds checkpoints")
    return wanted


def _merge(trainer: TDPOTrainer, models: ModelOptions) -> bool:
    """Saves the policy with the saved adapters merged, if that is asked for and there is none of these adapters yet.

    They are merged into the policy as it started, in its own precision: never into 4-bit weights.

    Returns:
        Whether it did.
    """
    if not models.merge_adapters or not trainer.args.should_save:
        return False
    out = Path(trainer.args.output_dir)
    stamp, made_of = out / MERGED / _MADE_OF, {"adapters": file_digest(out / _ADAPTERS)}
    if stamp.is_file() and read_json(stamp) == made_of:
        return False
    from peft import PeftModel

    with whole_folder(out / MERGED) as folder:
        merge_adapters(PeftModel.from_pretrained(load_adapted_model(models), str(out))).save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        write_json(folder / _MADE_OF, made_of)
    return True


def show(options: Options) -> None:
    """Prints what will be trained on: the data as counts, lengths and tokens. Reads no weights."""
    models, data, args = options
    require(models, "model")
    sources, columns = _sources(data), args.trained_objective().token_columns
    assert isinstance(data, ShowOptions)
    view = View(
        rows=data.show_rows,
        tokens=data.show_tokens,
        width=shutil.get_terminal_size((100, 24)).columns,
        colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),
    )
    tokenizer = load_tokenizer(models)
    texts = []
    for name, (source, split) in sources.items():
        title, rows = f"{name} data: {source}, split {split}", load_preferences(source, split, data.streaming)
        if isinstance(rows, IterableDataset):
            title, rows = f"{title}, its first {_OF_A_STREAM:,} rows", Dataset.from_list(list(rows.take(_OF_A_STREAM)))
        dataset, summary = tokenize_rows(rows, tokenizer, args, columns)
        texts.append(data_text(title, dataset, summary, tokenizer, args, view))
    if data.show_rows:
        texts.append(legend_text(view))
    if args.should_save:
        encoding = sys.stdout.encoding  # which may lack characters
        print("\n\n".join(texts).encode(encoding, "backslashreplace").decode(encoding))


def memory(options: Options) -> None:
    """Prints what a training will need, and whether it fits. Reads no weights and no data."""
    models, data, args = options
    require(models, "model")
    assert isinstance(data, MemoryOptions)
    unset_hf_deepspeed_config()  # which would partition a model that is built
    report = report_of(models, data, args)
    if args.should_save:
        print(json.dumps(report.as_json(), indent=1) if data.json else report)


def _sources(data: DataOptions) -> dict[str, tuple[str, str]]:
    """The training data and, where given, the evaluation data, each with its split."""
    sources = {"train": (require(data, "dataset"), data.split)}
    if data.eval_dataset is not None:
        sources["eval"] = (data.eval_dataset, data.eval_split)
    return sources


def audit(options: Options) -> None:
    """Compares the loss of two pairs with plain arithmetic, as training does before its first step; trains nothing."""
    require(options.models, "model")
    options.training.push_to_hub = False  # nothing is published
    report = _trainer(options, train_dataset=_training_data(options), eval_dataset=None).audit()
    if options.training.should_save:
        print(report)


def evaluate(options: Options) -> None:
    """Prints the metrics of a policy against a reference on preference pairs, as JSON."""
    models, _, args = options
    require(models, "model")
    if args.variant not in REFERENCE_FREE:
        require(models, "ref_model")
    args.push_to_hub = False  # nothing is published
    trainer = _trainer(options, train_dataset=None, eval_dataset=_evaluation_data(options))
    metrics = trainer.evaluate()
    if args.should_save:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        Path(args.output_dir, "metrics.json").write_text(json.dumps(metrics, indent=1))
        print(json.dumps(metrics, indent=1))


def cache(options: Options) -> None:
    """Runs the reference over the data and caches its hidden states for training with `--precompute_reference`."""
    models, data, args = options
    require(models, "model")
    sources = _sources(data)
    tokenizer = load_tokenizer(models)
    reference = load_reference(models)
    model = (load_policy(models) if reference is None else reference).to(args.device)
    argument = "model" if reference is None else "ref_model"
    with autocast(args):
        check_model(argument, model, args, tokenizer)
    tokenize = Tokenization(tokenizer, args, embedded_ids(**{argument: model}))
    for name, (source, split) in sources.items():
        tokens = tokenize(name, load_preferences(source, split))
        folder = args.reference_folder / name
        with autocast(args):
            cache_reference(
                folder, model, tokens, padding_token(tokenizer), args.reference_dtype, progress=shows_bars(args)
            )
        print(f"cached {len(tokens)} rows in {folder}")
