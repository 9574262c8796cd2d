"""Continuations of evaluation prompts by policy and reference, side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

Sample = dict[str, str]  # the prompt, and a continuation by each model, by name
Model = tuple[Any, Callable[[], AbstractContextManager[Any]]]  # a model that generates, and a context to run it in


@torch.no_grad()
def continuations(
    models: dict[str, Model],
    tokenizer: PreTrainedTokenizerBase,
    rows: Iterable[dict[str, Any]],
    tokens: int,
) -> list[Sample]:
    """Greedy continuations, of at most `tokens` tokens, of the prompts of tokenized rows."""
    samples = []
    for row in rows:
        (prompt,) = tokenizer.batch_decode([row["prompt_ids"]])
        sample = {"prompt": prompt}
        for name, (model, context) in models.items():
            with context():
                sample[name] = _continuation(model, tokenizer, row["prompt_ids"], tokens)
        samples.append(sample)
    return samples


def show_samples(samples: list[Sample], path: Path) -> None:
    """Writes samples to a JSON file, and to stderr for people."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(samples, indent=1))
    for sample in samples:
        shown = "\n".join(f"{name:>10s}: {' '.join(text.split())}" for name, text in sample.items())
        print(f"{shown}\n", file=sys.stderr, flush=True)


def _continuation(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: int) -> str:
    was_training = model.training
    model.eval()
    ids = torch.tensor([prompt or [tokenizer.eos_token_id]], device=model.device)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=tokens,
        pad_token_id=tokenizer.eos_token_id,
    )
    model.train(was_training)
    return tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)[0]
