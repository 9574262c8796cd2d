"""What becomes of every option of transformers' TrainingArguments, TRL's DPOConfig and TDPOConfig in the two trainers.

The data of docs/options.md (`tools/options.py`), which tests/trainer/test_options_table.py holds to the installed
releases and to what the trainers do.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

TRIED = {"transformers": "5.24", "TRL": "1.14 and 1.16"}


class Fate(Enum):
    """Of an option in a trainer."""

    WORKS = "works"  # as in transformers' or TRL's own trainer
    REFUSED = "refused"  # where it is set, by its name, with what to use instead
    UNTRIED = "not tried"  # passed on, but no test has shown that it works
    ABSENT = "-"  # the trainer's configuration has no such option


WORKS, REFUSED, UNTRIED, ABSENT = Fate


@dataclass(frozen=True)
class Entry:
    """An option.

    Args:
        native, trl: its fate in `tdpo.TDPOTrainer` and in `tdpo.trl.TDPOTrainer`.
        note: Markdown: what to know, or what to use instead. What a refusal says is not repeated.
        shown: the test file that shows what works; None: test_options_table.py, beside a trainer without TDPO.
    """

    native: Fate = WORKS
    trl: Fate = WORKS
    note: str = ""
    shown: str | None = None


def _untried(note: str) -> Entry:
    return Entry(UNTRIED, UNTRIED, note)


_BOTH_REFUSE = Entry(REFUSED, REFUSED)
_HUB = "tests/trainer/runs/test_hub.py"
_DEVICE = _untried("needs a GPU")
_NODES = _untried("needs several machines")
_REPORT = _untried("read by the integrations that `report_to` names")
_SCRIPTS = Entry(note="no trainer reads it: transformers leaves it to scripts")
_HANDLER = Entry(note="shown as far as accelerate's handler of DDP")

# By group, then by name, in transformers' order.
OF_TRANSFORMERS: dict[str, dict[str, Entry]] = {
    "Length and batches": {
        "output_dir": Entry(),
        "per_device_train_batch_size": Entry(note="pairs, not sequences"),
        "per_device_eval_batch_size": Entry(note="pairs"),
        "num_train_epochs": Entry(),
        "max_steps": Entry(),
        "gradient_accumulation_steps": Entry(),
        "average_tokens_across_devices": _BOTH_REFUSE,
        "auto_find_batch_size": Entry(),
    },
    "Optimizer and schedule": {
        "learning_rate": Entry(note="default here: 1e-6, or 1e-5 where adapters train; TRL's: 1e-6"),
        "lr_scheduler_type": Entry(),
        "lr_scheduler_kwargs": Entry(),
        "warmup_steps": Entry(),
        "optim": Entry(note="those of torch are shown"),
        "optim_args": Entry(note="refused where the optimizer reads none of it"),
        "optim_target_modules": _untried("GaLore, APOLLO and their like, which need packages"),
        "weight_decay": Entry(),
        "adam_beta1": Entry(),
        "adam_beta2": Entry(),
        "adam_epsilon": Entry(),
        "max_grad_norm": Entry(),
        "label_smoothing_factor": _BOTH_REFUSE,
        "neftune_noise_alpha": Entry(note="the reference and evaluations have no noise"),
    },
    "Precision, memory and compilers": {
        "bf16": Entry(note="weights keep their precision (docs/models.md); TRL's default is True"),
        "fp16": _untried("needs a GPU; refused on a CPU, which would ignore it"),
        "bf16_full_eval": Entry(REFUSED, UNTRIED),
        "fp16_full_eval": Entry(REFUSED, UNTRIED),
        "tf32": _DEVICE,
        "activation_checkpointing": Entry(note="TRL's default is True, by the older name"),
        "activation_checkpointing_kwargs": Entry(),
        "gradient_checkpointing": Entry(note="the older name of activation_checkpointing"),
        "gradient_checkpointing_kwargs": Entry(note="the older name of activation_checkpointing_kwargs"),
        "torch_compile": _BOTH_REFUSE,
        "torch_compile_backend": _BOTH_REFUSE,
        "torch_compile_mode": _BOTH_REFUSE,
        "use_liger_kernel": Entry(REFUSED, UNTRIED, "TRL lets Liger replace layers, not the loss"),
        "liger_kernel_config": Entry(REFUSED, UNTRIED),
        "use_cache": Entry(note="of the model's configuration; training keeps no cache"),
        "torch_empty_cache_steps": Entry(),
    },
    "Data": {
        "train_sampling_strategy": Entry(note="`group_by_length` needs a column of lengths in tdpo.trl"),
        "length_column_name": Entry(REFUSED, WORKS, shown="tests/trainer/trl/test_trainer.py"),
        "remove_unused_columns": Entry(REFUSED, WORKS),
        "label_names": _BOTH_REFUSE,
        "dataloader_drop_last": Entry(),
        "dataloader_num_workers": Entry(),
        "dataloader_pin_memory": _DEVICE,
        "dataloader_persistent_workers": Entry(),
        "dataloader_prefetch_factor": Entry(),
        "dataloader_multiprocessing_context": Entry(),
        "dataloader_in_order": Entry(),
        "accelerator_config": Entry(note="`gradient_accumulation_kwargs` is shown, of the others none"),
        "seed": Entry(),
        "data_seed": Entry(),
        "full_determinism": Entry(),
        "ignore_data_skip": Entry(),
    },
    "Logs": {
        "logging_strategy": Entry(),
        "logging_steps": Entry(note="default here and in TRL: 10"),
        "logging_first_step": Entry(),
        "log_on_each_node": _NODES,
        "logging_nan_inf_filter": Entry(REFUSED, UNTRIED),
        "include_num_input_tokens_seen": Entry(note="replaces `num_tokens`: responses, each with its prompt"),
        "log_level": Entry(),
        "log_level_replica": _untried("needs several processes"),
        "disable_tqdm": Entry(),
        "report_to": Entry(note="by a stand-in for an integration"),
        "run_name": _REPORT,
        "project": _REPORT,
        "trackio_space_id": _REPORT,
        "trackio_bucket_id": _REPORT,
        "trackio_static_space_id": _REPORT,
        "skip_memory_metrics": Entry(),
        "debug": Entry(note="`underflow_overflow`"),
    },
    "Evaluation": {
        "eval_strategy": Entry(),
        "eval_steps": Entry(),
        "eval_delay": Entry(),
        "eval_on_start": Entry(),
        "prediction_loss_only": Entry(note="always so: `predict` gives metrics, no logits"),
        "eval_do_concat_batches": _BOTH_REFUSE,
        "eval_use_gather_object": _BOTH_REFUSE,
        "eval_accumulation_steps": _BOTH_REFUSE,
        "include_for_metrics": _BOTH_REFUSE,
        "batch_eval_metrics": _BOTH_REFUSE,
        "metric_for_best_model": Entry(),
        "greater_is_better": Entry(),
        "load_best_model_at_end": Entry(),
    },
    "Checkpoints": {
        "save_strategy": Entry(),
        "save_steps": Entry(),
        "save_total_limit": Entry(),
        "save_only_model": Entry(note="tdpo does not resume from such a checkpoint"),
        "save_on_each_node": _NODES,
        "enable_jit_checkpoint": Entry(REFUSED, UNTRIED),
        "restore_callback_states_from_checkpoint": Entry(),
        "resume_from_checkpoint": _SCRIPTS,
    },
    "Hub": {
        "push_to_hub": Entry(shown=_HUB, trl=UNTRIED),
        "hub_token": Entry(),
        "hub_private_repo": Entry(),
        "hub_model_id": Entry(),
        "hub_strategy": Entry(shown=_HUB, trl=UNTRIED),
        "hub_always_push": Entry(shown=_HUB, trl=UNTRIED),
        "hub_revision": _untried("a branch of a hub"),
    },
    "Devices and engines": {
        "use_cpu": Entry(),
        "parallelism_config": _untried("refused where it splits sequences (`cp_size`, `sp_size`)"),
        "ddp_find_unused_parameters": _HANDLER,
        "ddp_bucket_cap_mb": _HANDLER,
        "ddp_broadcast_buffers": _HANDLER,
        "ddp_static_graph": _HANDLER,
        "ddp_backend": _untried("gloo is what tests of DDP use, NCCL has not been run"),
        "ddp_timeout": _untried("needs several processes"),
        "fsdp": _untried("what tests of FSDP2 configure is accelerate's, by ACCELERATE_USE_FSDP"),
        "fsdp_config": _untried("what tests of FSDP2 configure is accelerate's, by ACCELERATE_USE_FSDP"),
        "deepspeed": Entry(trl=UNTRIED, shown="tests/trainer/models/test_engines.py", note="by `make engines` alone"),
        "local_rank": Entry(note="nothing reads it: launchers set LOCAL_RANK"),
        "do_train": _SCRIPTS,
        "do_eval": _SCRIPTS,
        "do_predict": _SCRIPTS,
    },
}

_TRL = "tests/trainer/trl/test_trainer.py"


def _of_trl(note: str, trl: Fate = WORKS) -> Entry:
    return Entry(ABSENT, trl, note, _TRL if trl == WORKS else None)


# Of DPOConfig alone, or of both configurations; the note says what TDPOConfig has.
OF_TRL: dict[str, Entry] = {
    "beta": Entry(shown=_TRL),
    "loss_type": _of_trl("`variant`: tdpo2 (default), tdpo1, dpo, ipo, simpo, tis_dpo; others are an `objective`"),
    "loss_weights": _of_trl("an `objective` that sums losses (docs/objectives.md)"),
    "label_smoothing": Entry(shown=_TRL, note="of variant dpo; TRL's: of loss_type robust and exo_pair"),
    "discopop_tau": _of_trl("an `objective`"),
    "f_divergence_type": _of_trl("", REFUSED),
    "f_alpha_divergence_coef": _of_trl("", REFUSED),
    "ld_alpha": _of_trl("", REFUSED),
    "use_weighting": _of_trl("", REFUSED),
    "max_length": Entry(note="a number, no None"),
    "truncation_mode": Entry(ABSENT, note="`max_prompt_length`, of which the end is kept, and `overlong`"),
    "pad_to_multiple_of": Entry(ABSENT, note="none: `padding_free` pads nothing"),
    "pad_token": _of_trl("set `tokenizer.pad_token`"),
    "padding_free": Entry(WORKS, REFUSED, shown="tests/trainer/test_rows_given.py"),
    "dataset_num_proc": Entry(trl=UNTRIED, shown="tests/trainer/test_trainer.py"),
    "disable_dropout": Entry(trl=UNTRIED, shown="tests/trainer/test_policy.py"),
    "router_aux_loss_coef": Entry(shown="tests/trainer/models/test_routers.py"),
    "precompute_ref_log_probs": _of_trl("", REFUSED),
    "precompute_ref_batch_size": _of_trl("", REFUSED),
    "sync_ref_model": _of_trl("none: the reference is frozen"),
    "ref_model_mixup_alpha": _of_trl("none"),
    "ref_model_sync_steps": _of_trl("none"),
    "activation_offloading": _of_trl("none", UNTRIED),
    "model_init_kwargs": _of_trl("load the model yourself; the command line has `--dtype` and others"),
    "trust_remote_code": _of_trl("load the model yourself; the command line has `--trust_remote_code`"),
}

_OF_TDPO = "tests/trainer/test_config.py"


def _ours(shown: str, note: str = "") -> Entry:
    return Entry(WORKS, ABSENT, note, shown)


_ARGUMENT = "an argument of tdpo.trl.TDPOTrainer"

# Of TDPOConfig alone; the note says what there is in tdpo.trl.
OF_TDPO: dict[str, Entry] = {
    "variant": _ours(_OF_TDPO, _ARGUMENT),
    "alpha": _ours(_OF_TDPO, _ARGUMENT),
    "kl_direction": _ours(_OF_TDPO, _ARGUMENT),
    "logits_budget": _ours(_OF_TDPO, _ARGUMENT),
    "audit": _ours("tests/trainer/test_audit.py", _ARGUMENT),
    "simpo_gamma": _ours(_OF_TDPO),
    "columns": _ours("tests/trainer/data/test_forms.py", "rename the columns of the dataset"),
    "pairing": _ours("tests/trainer/data/test_ranked.py"),
    "pairs_per_prompt": _ours("tests/trainer/test_options_table.py"),
    "learned_turns": _ours("tests/trainer/data/test_conversation.py"),
    "max_prompt_length": _ours("tests/trainer/data/test_tokenize.py", "`truncation_mode`"),
    "overlong": _ours("tests/trainer/data/test_tokenize.py", "`truncation_mode`"),
    "token_columns": _ours("tests/trainer/data/test_token_data.py"),
    "kl_warning": _ours("tests/trainer/runs/test_logs.py"),
    "shared_prompts": _ours("tests/trainer/data/test_shared_prompts.py"),
    "precompute_reference": _ours("tests/trainer/reference/test_cache.py"),
    "reference_cache": _ours("tests/trainer/reference/test_cache.py"),
    "reference_dtype": _ours("tests/trainer/reference/test_cache.py"),
    "eval_samples": _ours("tests/trainer/runs/test_samples.py"),
    "eval_sample_tokens": _ours("tests/trainer/runs/test_samples.py"),
    "resume_anyway": _ours("tests/trainer/runs/test_record.py"),
}
