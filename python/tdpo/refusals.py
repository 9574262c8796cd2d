"""Options of transformers and of TRL that can't do here what they do there, and what to use instead.

Free of torch and transformers, but for `refuse_for_device`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Refusal:
    """An option that is refused.

    Args:
        unused: its value that is accepted, because nothing asks for it.
        instead: what is so anyway, or what to use.
    """

    unused: Any
    instead: str


_NO_PREDICTIONS = "an evaluation keeps the loss and its metrics, and no predictions"
_NO_COMPILER = (
    "the fused loss can't be traced, so compile the policy's body yourself (model.base_model.compile()), and set "
    "neither torch_compile_backend nor torch_compile_mode"
)
_NO_LIGER = "Liger's forward would replace the one that computes this loss, which is fused already"

_OF_BOTH = {
    "include_for_metrics": Refusal([], _NO_PREDICTIONS),
    "batch_eval_metrics": Refusal(False, _NO_PREDICTIONS),
    "eval_do_concat_batches": Refusal(True, _NO_PREDICTIONS),
    "eval_use_gather_object": Refusal(False, _NO_PREDICTIONS),
    "eval_accumulation_steps": Refusal(None, _NO_PREDICTIONS),
    "label_names": Refusal(None, "the labels are the tokens of the responses"),
    "average_tokens_across_devices": Refusal(True, "the loss is a mean over pairs, of however many tokens"),
    # In this order: each of the three sets those after it.
    "torch_compile_mode": Refusal(None, _NO_COMPILER),
    "torch_compile": Refusal(False, _NO_COMPILER),
    "torch_compile_backend": Refusal(None, _NO_COMPILER),
}


def _no_cast(precision: str) -> Refusal:
    instead = f"set {precision} instead, in which both are evaluated as they are trained"
    return Refusal(False, f"it would cast the policy for good, and not its reference; {instead}")


OF_TRANSFORMERS = {
    **_OF_BOTH,
    "bf16_full_eval": _no_cast("bf16"),
    "fp16_full_eval": _no_cast("fp16"),
    "label_smoothing_factor": Refusal(
        0.0,
        "it smooths labels of a cross entropy; preferences that may be flipped are label_smoothing of variant 'dpo'",
    ),
    "use_liger_kernel": Refusal(False, _NO_LIGER),
    "liger_kernel_config": Refusal(None, _NO_LIGER),
    "logging_nan_inf_filter": Refusal(True, "a loss that is not finite ends the training"),
    "enable_jit_checkpoint": Refusal(False, "a SIGTERM ends the training with a checkpoint anyway"),
    "remove_unused_columns": Refusal(False, "the collator reads columns that no model takes"),
    "length_column_name": Refusal("length", "rows are tokenized here, and that column holds their lengths"),
}

_NOT_HERE = "it is not supported here"
_OF_TOKENS = f"{_NOT_HERE}; an objective of tdpo.TDPOTrainer can weigh tokens (docs/objectives.md)"
_OF_DIVERGENCES = f"{_NOT_HERE}; tdpo.TDPOTrainer takes any loss as its objective (docs/objectives.md)"
_OF_CACHES = (
    f"{_NOT_HERE}, where losses need the reference's KL too; tdpo.TDPOTrainer caches its hidden states with "
    "precompute_reference"
)

OF_TRL = {
    **_OF_BOTH,
    "label_smoothing_factor": Refusal(
        0.0,
        "it smooths labels of a cross entropy; preferences that may be flipped are label_smoothing of loss_type robust",
    ),
    "f_divergence_type": Refusal("reverse_kl", _OF_DIVERGENCES),
    "f_alpha_divergence_coef": Refusal(0.5, _OF_DIVERGENCES),
    "ld_alpha": Refusal(None, _OF_TOKENS),
    "use_weighting": Refusal(False, _OF_TOKENS),
    "precompute_ref_log_probs": Refusal(False, _OF_CACHES),
    "precompute_ref_batch_size": Refusal(None, _OF_CACHES),
    "padding_free": Refusal(False, f"{_NOT_HERE}, and TRL ignores it; tdpo.TDPOTrainer packs rows with padding_free"),
}


def refuse(args: Any, refusals: dict[str, Refusal]) -> None:
    """Refuses options that have no use.

    Args:
        args: whatever has transformers' options as attributes.

    Raises:
        ValueError: one is set; the message names it and says what to use instead.
    """
    for name, refusal in refusals.items():
        value = getattr(args, name, refusal.unused)  # some are of newer releases
        if value != refusal.unused:
            raise ValueError(f"{name} is {value!r}; leave it at {refusal.unused!r}: {refusal.instead}")
    parallel = args.parallelism_config
    if parallel is not None and max(parallel.cp_size, getattr(parallel, "sp_size", 1)) > 1:
        raise ValueError(
            f"parallelism_config splits sequences (cp_size {parallel.cp_size}, sp_size "
            f"{getattr(parallel, 'sp_size', 1)}), of which the loss needs every token: split layers (tp_size) or data"
        )


def refuse_for_device(args: Any) -> None:
    """Refuses options that the device can't follow.

    Raises:
        ValueError: one is set; the message names it and says what to use instead.
    """
    import torch

    if args.fp16 and (args.use_cpu or not torch.accelerator.is_available()):
        raise ValueError("fp16 is True; leave it at False on a CPU, where nothing computes in float16: use bf16")


def use_one_gpu(args: Any, model: Any) -> None:
    """Lets a process without a launcher use one of several GPUs, or those that `device_map` spread its model over.

    transformers would use DataParallel, which cuts the tensors of a batch.
    """
    if args.device.type != "cuda" or args.n_gpu < 2:
        return
    args._n_gpu = 1
    if len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        logger.warning(
            "several GPUs are visible, and this process uses %s alone; to train on all of them, start the script or "
            "`tdpo train` with `accelerate launch` or torchrun",
            args.device,
        )


def check_batches(accelerator_config: Any) -> None:
    """Refuses that one process makes the batches of all and cuts them.

    Args:
        accelerator_config: of TrainingArguments after their own checks.

    Raises:
        ValueError: it asks for that.
    """
    if accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config has dispatch_batches True, which cuts batches by rows, and with them the response "
            "tokens of several rows: leave it out, so that every process makes its own"
        )
