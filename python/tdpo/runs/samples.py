"""Continuations of evaluation prompts by policy and reference, side by side."""

from __future__ import annotations

import json
import logging
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import TDPOConfig
from ..data.stream import PreferenceStream
from ..models.noise import evaluation_mode
from ..precision import autocast
from ..reference.cached_states import CachedStates
from ..reference.reference import Reference

logger = logging.getLogger(__name__)
SAMPLES = "samples"  # the folder, in output_dir


def refuses_samples(*, sharded: bool) -> bool:
    """Whether no samples can be drawn, and says so: generating would gather sharded weights for every token."""
    if sharded:
        logger.warning("eval_samples: no samples are drawn while weights are sharded")
    return sharded


@torch.no_grad()
def show_samples(
    policy: Any,
    reference: Reference | None,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset | PreferenceStream | IterableDatasetShard,
    args: TDPOConfig,
    name: str,
) -> None:
    """Shows greedy continuations of a data set's first prompts on stderr, and in samples/NAME.json in output_dir.

    Args:
        policy: with its adapters.
        reference: it is left out where there is none, or no more than its head is in memory.
        dataset: tokenized data, or a process's share of a stream.
        args: `eval_samples` is the number of prompts, `eval_sample_tokens` the limit of a continuation.
    """
    if isinstance(dataset, IterableDatasetShard):
        dataset = dataset.dataset
    prompts = [row["prompt_ids"] for row in islice(dataset, args.eval_samples)]
    columns = {"prompt": tokenizer.batch_decode(prompts)}
    with autocast(args):
        columns["policy"] = [_continuation(policy, tokenizer, ids, args.eval_sample_tokens) for ids in prompts]
        if reference is not None and not isinstance(reference, CachedStates):
            with reference.running():
                texts = [_continuation(reference.model, tokenizer, ids, args.eval_sample_tokens) for ids in prompts]
            columns["reference"] = texts
    samples = [dict(zip(columns, texts)) for texts in zip(*columns.values())]
    path = Path(args.output_dir, SAMPLES, f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(samples, indent=1))
    for sample in samples:
        shown = "\n".join(f"{who:>10s}: {' '.join(text.split())}" for who, text in sample.items())
        print(f"{shown}\n", file=sys.stderr, flush=True)


def _continuation(model: Any, tokenizer: PreTrainedTokenizerBase, prompt: list[int], tokens: int) -> str:
    ids = torch.tensor([prompt or [tokenizer.eos_token_id]], device=model.device)
    with evaluation_mode(model):
        generated = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=tokens,
            pad_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)[0]
