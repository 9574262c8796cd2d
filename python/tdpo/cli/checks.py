"""What a command's options name and need, looked at before anything slow is loaded: no hub is asked."""

from __future__ import annotations

import glob
import os
from pathlib import Path
from types import SimpleNamespace

from ..data.formats import format_of
from ..extras import require_package
from ..memory.sizes import bytes_of
from ..models.loading import merges_adapters, trains_adapters
from ..models.names import check_exists, check_gguf_exists, is_here, looks_like_path
from ..option_checks import (
    NEEDED_BY_TRAIN,
    check_alone,
    check_best_metric,
    check_each,
    check_merging,
    check_model_options,
    check_needed,
    check_output_dir,
    check_precision_of_merged,
    check_stream_options,
)
from ..options import REFERENCE_FREE, DataOptions, MemoryOptions, require
from .parse import Given
from .values import FILES

REQUIRED = {
    "train": ("model", "dataset"),
    "data": ("model", "dataset"),
    "audit": ("model", "dataset"),
    "evaluate": ("model", "ref_model", "eval_dataset"),
    "cache-reference": ("model", "dataset"),
    "memory": ("model",),
}


def check_command(command: str, given: Given) -> None:
    """Checks that what a command needs is given, that the files are there, and that the models' options go together.

    Raises:
        TypeError, ValueError: the message names the option or the file.
        MissingExtra: a package that an option needs is not installed.
    """
    models, data = given.models, given.data
    training = SimpleNamespace(**{**given.defaults, **given.training})
    for name in REQUIRED[command]:
        if name != "ref_model" or given.value("variant") not in REFERENCE_FREE:
            require(models if hasattr(models, name) else data, name)
    if command == "train":
        output_dir = os.path.expanduser(given.value("output_dir"))
        check_output_dir(output_dir, {"model": models.model, "ref_model": models.ref_model})
        check_can_be_made(output_dir)
        check_evaluations(given)
        check_alone(training, NEEDED_BY_TRAIN, given.defaults)
    if command != "cache-reference":
        check_needed(training)
    check_best_metric(given.value("metric_for_best_model"))
    if data.streaming and command == "cache-reference":
        raise ValueError("streaming is True, but a cache holds the hidden states of rows by number: leave it out")
    if data.streaming and command != "data":
        check_stream_options(training, trains=command in ("train", "audit"))
    if is_here(str(models.model)):  # what adapters a hub's model has is known when it is loaded
        check_merging(models, trains_adapters=trains_adapters(models))
        check_precision_of_merged(models, merges=merges_adapters(models))
    check_model_options(models, loads=command != "memory")
    if isinstance(data, MemoryOptions):
        check_each(MemoryOptions, data)
        if data.gpu_memory is not None:
            bytes_of("gpu_memory", data.gpu_memory)
    for model in filter(None, (models.model, models.ref_model)):
        check_exists("model", model)
    if models.model is not None and models.gguf_file is not None:
        check_gguf_exists(models.model, "gguf_file", models.gguf_file)
    if models.ref_model is not None and models.ref_gguf_file is not None:
        check_gguf_exists(models.ref_model, "ref_gguf_file", models.ref_gguf_file)
    read = {"audit": (data.dataset,), "evaluate": (data.eval_dataset,), "memory": ()}.get(
        command, (data.dataset, data.eval_dataset)
    )
    for dataset in filter(None, read):
        check_dataset(dataset)
    for name in FILES:
        file = given.value(name)
        if isinstance(file, str) and file.endswith(".json") and not Path(file).is_file():
            raise ValueError(f"{name} is {file}; there is no such file")
    if given.value("deepspeed") is not None:
        require_package("deepspeed")
    checkpoint = given.value("resume_from_checkpoint")
    if isinstance(checkpoint, str) and not Path(checkpoint).is_dir():
        raise ValueError(f"resume_from_checkpoint is {checkpoint}; there is no such folder")


def check_evaluations(given: Given) -> None:
    """Refuses options of evaluations while training where there are none.

    Raises:
        ValueError: the message names the option.
    """
    strategy = str(given.value("eval_strategy"))
    if given.data.eval_dataset is None:
        if strategy != "no" or given.value("eval_on_start"):
            name = "eval_on_start" if strategy == "no" else "eval_strategy"
            raise ValueError(f"{name} is {given.value(name)}, but there are no data to evaluate on: set eval_dataset")
        if given.data.eval_split != DataOptions.eval_split:
            raise ValueError(f"eval_split is {given.data.eval_split}, but eval_dataset is missing")
    if given.value("eval_samples") and strategy == "no" and not given.value("eval_on_start"):
        raise ValueError("eval_samples is set, but nothing is evaluated while training: set eval_strategy")


def check_can_be_made(output_dir: str) -> None:
    """Raises ValueError where a folder is no folder, or can't be written in."""
    folder = Path(output_dir).absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ValueError(f"output_dir is {output_dir}, but {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"output_dir is {output_dir}, but nothing can be written in {there}")


def check_dataset(name: str) -> None:
    """Raises ValueError where a name is a path or a pattern of files, and nothing is there."""
    if Path(name).exists() or glob.glob(name, recursive=True):
        return
    if format_of(Path(name)) is not None:
        raise ValueError(f"the dataset file {name} does not exist")
    if looks_like_path(name) or glob.has_magic(name):
        raise ValueError(f"the dataset {name} does not exist")
