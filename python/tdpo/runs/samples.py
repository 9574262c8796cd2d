"""Continuations of evaluation prompts by policy and reference, side by side."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..precision import autocast

if TYPE_CHECKING:
    from ..trainer import TDPOTrainer

logger = logging.getLogger(__name__)


@torch.no_grad()
def show_samples(trainer: TDPOTrainer, loader: DataLoader, prefix: str) -> None:
    """Prints greedy continuations and writes them to `samples`/PREFIX-step-N.json in the output folder.

    The reference is left out where only its head is in memory. Under FSDP and DeepSpeed nothing is sampled: generation
    would gather the sharded weights for every token.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.warning("eval_samples: no samples are drawn while weights are sharded")
        return
    if not args.should_save:
        return
    dataset: Any = loader.dataset
    policy = trainer.accelerator.unwrap_model(trainer.model)
    models = {"policy": (policy, contextlib.nullcontext)}
    if trainer.ref_model is not None:
        models["reference"] = (trainer.ref_model, contextlib.nullcontext)
    elif hasattr(policy, "disable_adapter") and not args.precompute_reference:
        models["reference"] = (policy, policy.disable_adapter)
    samples = []
    for row in dataset.select(range(min(args.eval_samples, len(dataset)))):
        sample = {"prompt": tokenizer.decode(row["prompt_ids"])}
        for name, (model, context) in models.items():
            with context(), autocast(args):
                sample[name] = _continuation(trainer, model, row["prompt_ids"])
        samples.append(sample)
    folder = Path(args.output_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-step-{trainer.state.global_step}.json").write_text(json.dumps(samples, indent=1))
    for sample in samples:
        shown = "\n".join(f"{name:>10s}: {' '.join(text.split())}" for name, text in sample.items())
        print(f"{shown}\n", file=sys.stderr, flush=True)


def _continuation(trainer: TDPOTrainer, model: nn.Module, prompt: list[int]) -> str:
    tokenizer, was_training = trainer.processing_class, model.training
    model.eval()
    tokens = torch.tensor([prompt or [tokenizer.eos_token_id]], device=trainer.args.device)
    generated = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=trainer.args.eval_sample_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    return tokenizer.decode(generated[0, tokens.shape[1] :], skip_special_tokens=True)
