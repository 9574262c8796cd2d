"""Responses sampled so that models can be compared: all of them draw their tokens with the same random numbers."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel

_SAMPLED_TOGETHER = 128


class SharedNoise(LogitsProcessor):
    """Adds Gumbel noise to logits: the largest sum is a sample at temperature 1 (the Gumbel-max trick).

    Equal seeds give equal noise, so two models draw the same token unless their logits differ by more than the lead of
    the largest sum. What then differs between their texts is due to the models, not to the dice.
    """

    def __init__(self, seed: int, device: torch.device):
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        exponential = torch.empty_like(scores, dtype=torch.float32)
        exponential.exponential_(generator=self._generator)  # never 0, so its logarithm is finite
        return scores - exponential.log_()


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Tensor, tokens: int, seed: int, desc: str | None = None) -> Tensor:
    """Responses sampled at temperature 1: prompts (n, P) -> (n, tokens).

    Equal seeds give every model the same noise for a token of a response, whatever it has written before.
    """
    was_training = model.training
    model.eval()
    noise, responses = SharedNoise(seed, model.device), []
    for part in tqdm(prompts.split(_SAMPLED_TOGETHER), desc=desc, disable=desc is None):
        part = part.to(model.device)
        sequences = model.generate(  # type: ignore[operator]
            input_ids=part,
            attention_mask=torch.ones_like(part),
            logits_processor=LogitsProcessorList([noise]),
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            pad_token_id=0,  # never used: all responses have the same length
        )
        responses.append(sequences[:, part.shape[1] :].cpu())
    model.train(was_training)
    return torch.cat(responses)
