"""Other values of options, and what shows their effect, for the walk over all options."""

from __future__ import annotations

import torch
from transformers import ProgressCallback, TrainerCallback

from helpers.option_runs import Run


def loader(run: Run):
    return run.trainer.get_train_dataloader().base_dataloader


def schedule(run: Run):
    return run.trainer.lr_scheduler.lr_lambdas[0]


def checkpointing(run: Run):
    return run.trainer.model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"]


def best(run: Run):
    state = run.trainer.state
    return int(state.best_model_checkpoint.split("-")[-1])


def weights_of_the_best(run: Run):
    saved = type(run.trainer.model).from_pretrained(run.trainer.state.best_model_checkpoint).state_dict()
    return all(torch.equal(saved[name], value) for name, value in run.trainer.model.state_dict().items())


def batch(run: Run):
    return next(iter(run.trainer.get_train_dataloader()))["input_ids"].tolist()


class Reporter(TrainerCallback):
    """Stands for an integration."""


# What shows that an option has its effect: where it can be known, a number that the option determines.
SHOWS = {
    "output_dir": lambda run: run.folder.exists(),
    "learning_rate": lambda run: run.group("initial_lr"),
    "lr_scheduler_type": lambda run: [schedule(run).func.__name__, [entry["learning_rate"] for entry in run.logged]],
    "lr_scheduler_kwargs": lambda run: schedule(run).keywords.get("num_cycles"),
    "warmup_steps": lambda run: schedule(run).keywords["num_warmup_steps"],
    "optim": lambda run: [type(run.trainer.optimizer.optimizer), run.group("fused")],
    "optim_args": lambda run: run.group("momentum"),
    "weight_decay": lambda run: run.group("weight_decay"),
    "adam_beta1": lambda run: {betas[0] for betas in run.group("betas")},
    "adam_beta2": lambda run: {betas[1] for betas in run.group("betas")},
    "adam_epsilon": lambda run: run.group("eps"),
    "max_grad_norm": lambda run: [round(norm, 5) for norm in run.watch.norms if norm <= 1e-3 + 1e-6],
    "gradient_accumulation_steps": lambda run: run.watch.substeps,
    "accelerator_config": lambda run: run.watch.substeps,
    "num_train_epochs": lambda run: run.trainer.state.epoch,
    "max_steps": lambda run: run.trainer.state.global_step,
    "per_device_train_batch_size": lambda run: [len(batch) for batch in run.recorder.batches],
    "auto_find_batch_size": lambda run: [len(batch) for batch in run.recorder.batches],
    "neftune_noise_alpha": lambda run: run.watch.noise,
    "bf16": lambda run: run.precision,
    "activation_checkpointing": lambda run: run.trainer.model.is_activation_checkpointing,
    "gradient_checkpointing": lambda run: run.trainer.model.is_activation_checkpointing,
    "activation_checkpointing_kwargs": checkpointing,
    "gradient_checkpointing_kwargs": checkpointing,
    "use_cache": lambda run: run.trainer.model.config.use_cache,
    "torch_empty_cache_steps": lambda run: run.cleared,
    "train_sampling_strategy": lambda run: run.recorder.batches,
    "seed": lambda run: run.recorder.batches,
    "data_seed": lambda run: run.recorder.batches,
    "remove_unused_columns": lambda run: "prompt" in run.trainer.get_train_dataloader().dataset.column_names,
    "dataloader_drop_last": lambda run: len(loader(run)),
    "dataloader_num_workers": lambda run: loader(run).num_workers,
    "dataloader_persistent_workers": lambda run: loader(run).persistent_workers,
    "dataloader_prefetch_factor": lambda run: loader(run).prefetch_factor,
    "dataloader_multiprocessing_context": lambda run: type(loader(run).multiprocessing_context),
    "dataloader_in_order": lambda run: loader(run).in_order,
    "full_determinism": lambda run: run.watch.deterministic,
    "logging_strategy": lambda run: run.watch.logs,
    "logging_steps": lambda run: run.watch.logs,
    "logging_first_step": lambda run: run.watch.logs,
    "include_num_input_tokens_seen": lambda run: any("num_input_tokens_seen" in entry for entry in run.logged),
    "log_level": lambda run: run.verbosity,
    "disable_tqdm": lambda run: any(isinstance(c, ProgressCallback) for c in run.trainer.callback_handler.callbacks),
    "report_to": lambda run: any(isinstance(c, Reporter) for c in run.trainer.callback_handler.callbacks),
    "skip_memory_metrics": lambda run: "train_mem_cpu_alloc_delta" in run.metrics,
    "debug": lambda run: run.trainer.args.debug,
    "eval_strategy": lambda run: run.watch.evaluations,
    "eval_steps": lambda run: run.watch.evaluations[-1] - run.watch.evaluations[-2],
    "eval_delay": lambda run: min(step for step in run.watch.evaluations if step),
    "eval_on_start": lambda run: 0 in run.watch.evaluations,
    "per_device_eval_batch_size": lambda run: [len(batch) for batch in run.recorder.batches].count(2),
    "prediction_loss_only": lambda run: run.trainer.predict(run.trainer.eval_dataset).predictions,
    "save_strategy": lambda run: run.files,
    "save_steps": lambda run: run.watch.saves,
    "save_total_limit": lambda run: run.files,
    "save_only_model": lambda run: [(run.folder / name / "optimizer.pt").exists() for name in run.files],
    "load_best_model_at_end": weights_of_the_best,
    "greater_is_better": best,
    "metric_for_best_model": lambda run: (
        run.trainer.state.best_metric
        == max(entry["eval_loss"] for entry in run.trainer.state.log_history if "eval_loss" in entry)
    ),
    "use_cpu": lambda run: run.trainer.args.device.type,
    "ddp_find_unused_parameters": lambda run: run.trainer.accelerator.ddp_handler.find_unused_parameters,
    "ddp_bucket_cap_mb": lambda run: run.trainer.accelerator.ddp_handler.bucket_cap_mb,
    "ddp_broadcast_buffers": lambda run: run.trainer.accelerator.ddp_handler.broadcast_buffers,
    "ddp_static_graph": lambda run: run.trainer.accelerator.ddp_handler.static_graph,
    **dict.fromkeys(("max_length", "truncation_mode", "pad_to_multiple_of"), batch),
    **dict.fromkeys(
        ("local_rank", "do_train", "do_eval", "do_predict", "resume_from_checkpoint"),
        lambda run: len(run.recorder.batches),  # as without it
    ),
}

# Options that one training can show together.
RUNS = {
    "Adam": {
        "learning_rate": 3e-3,
        "lr_scheduler_type": "cosine_with_restarts",
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "warmup_steps": 1,
        "optim": "adamw_torch",
        "weight_decay": 0.1,
        "adam_beta1": 0.8,
        "adam_beta2": 0.99,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 1e-3,
        "gradient_accumulation_steps": 2,
    },
    "another optimizer, and DDP": {
        "optim": "rmsprop",
        "optim_args": "momentum=0.5",
        "max_steps": 2,
        "ddp_find_unused_parameters": False,
        "ddp_bucket_cap_mb": 7,
        "ddp_broadcast_buffers": False,
        "ddp_static_graph": True,
    },
    "length": {"num_train_epochs": 2.0, "max_steps": -1, "per_device_train_batch_size": 8},
    "workers": {
        "dataloader_drop_last": True,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
        "dataloader_prefetch_factor": 3,
        "dataloader_multiprocessing_context": "fork",
        "dataloader_in_order": False,
    },
    "seed": {"seed": 7, "full_determinism": True, "torch_empty_cache_steps": 1},
    "seed of the data": {"data_seed": 3, "neftune_noise_alpha": 5.0, "use_cache": True},
    "order": {
        "train_sampling_strategy": "sequential",
        "accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}},
        "bf16": True,
    },
    "logs": {"logging_steps": 3, "logging_first_step": True, "include_num_input_tokens_seen": "all"},
    "logs by epoch": {
        "logging_strategy": "epoch",
        "log_level": "error",
        "disable_tqdm": False,
        "report_to": "dvclive",
        "skip_memory_metrics": False,
        "max_steps": 1,
    },
    "evaluations": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "eval_delay": 3,
        "eval_on_start": True,
        "per_device_eval_batch_size": 2,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
    "checkpoints": {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "save_only_model": True},
    "the best": {
        "eval_strategy": "steps",
        "save_strategy": "best",
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": True,
        "max_steps": 2,
    },
    "batch size": {"auto_find_batch_size": True, "max_steps": 2},
    "scripts": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "debug": "underflow_overflow",
        "prediction_loss_only": True,
        "do_train": True,
        "do_eval": True,
        "do_predict": True,
        "resume_from_checkpoint": "somewhere",
        "local_rank": 0,
        "use_cpu": True,
        "max_steps": 1,
    },
}
OF_TRL_ALONE = {
    "batches": {
        "remove_unused_columns": False,
        "max_length": 18,
        "truncation_mode": "keep_end",
        "pad_to_multiple_of": 8,
        "train_sampling_strategy": "sequential",
        "max_steps": 1,
    }
}
# What another value can't show on one CPU, or is what the trainer does anyway.
SAME = {"output_dir", "use_cpu", "prediction_loss_only", "debug", "full_determinism", "load_best_model_at_end"}
SAME |= {"do_train", "do_eval", "do_predict", "resume_from_checkpoint", "local_rank", "metric_for_best_model"}
SAME |= {"activation_checkpointing", "gradient_checkpointing", "ddp_find_unused_parameters"}  # TRL's defaults
STEPS = {"max_steps": 4, "per_device_train_batch_size": 5}
