"""Continuations of evaluation prompts by policy and reference, side by side."""

from __future__ import annotations

import contextlib
import json
import logging
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


@torch.no_grad()
def show_samples(trainer, loader, prefix: str) -> None:
    """Prints greedy continuations and keeps them in `samples`/PREFIX-step-N.json under the output folder.

    The reference's are left out where only its head is in memory; under FSDP and DeepSpeed, whose sharded weights
    generation would gather token by token, there are none.
    """
    args, tokenizer = trainer.args, trainer.processing_class
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        logger.warning("eval_samples: no samples are drawn while weights are sharded")
        return
    if not args.should_save:
        return
    rows = loader.dataset.select(range(min(args.eval_samples, len(loader.dataset))))
    model = trainer.accelerator.unwrap_model(trainer.model)
    writers = {"policy": (model, contextlib.nullcontext)}
    if trainer.ref_model is not None:
        writers["reference"] = (trainer.ref_model, contextlib.nullcontext)
    elif hasattr(model, "disable_adapter") and not args.precompute_reference:
        writers["reference"] = (model, model.disable_adapter)
    found = []
    for row in rows:
        sample = {"prompt": tokenizer.decode(row["prompt_ids"])}
        for name, (writer, context) in writers.items():
            with context():
                sample[name] = _continued(writer, row["prompt_ids"], tokenizer, args)
        found.append(sample)
    folder = Path(args.output_dir, "samples")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{prefix}-step-{trainer.state.global_step}.json").write_text(json.dumps(found, indent=1))
    for sample in found:
        print("\n".join(f"{name:>10s}: {' '.join(text.split())}" for name, text in sample.items()) + "\n", flush=True)


def _continued(model, prompt: list[int], tokenizer, args) -> str:
    training = model.training
    model.eval()
    tokens = torch.tensor([prompt or [tokenizer.eos_token_id]], device=args.device)
    made = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=args.eval_sample_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(training)
    return tokenizer.decode(made[0, tokens.shape[1] :], skip_special_tokens=True)
