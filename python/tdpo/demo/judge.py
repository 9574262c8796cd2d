"""Evaluation of a policy during and after training: its reward, its KL, and examples of what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback

from tdpo_ext import linear_token_divergence

from ..causal_lm import CausalLM
from ..files import write_json
from .language_model import sample
from .reviews import Reward
from .settings import DemoSettings


class Judge:
    """Reward and sequence KL of a policy, on samples for prompts that were not trained on."""

    def __init__(
        self,
        settings: DemoSettings,
        tokenizer: PreTrainedTokenizerFast,
        reward: Reward,
        prompts: Tensor,  # (n, P)
        reference: GPT2LMHeadModel,
    ):
        self.settings, self.tokenizer, self.reward, self.prompts = settings, tokenizer, reward, prompts
        self.reference = CausalLM.of(reference)

    @torch.no_grad()
    def __call__(self, model: GPT2LMHeadModel) -> dict[str, float]:
        """Mean reward of samples, and their mean sequence KL(reference || policy), in nats."""
        responses = sample(model, self.prompts, self.settings.response_tokens, self.settings.seed + 2)
        tokens = torch.cat([self.prompts, responses], 1)
        mask = torch.ones_like(tokens)
        policy, reference = CausalLM.of(model), self.reference
        labels = tokens[:, 1:].clone()
        labels[:, : self.prompts.shape[1] - 1] = -100
        divergence = linear_token_divergence(
            policy.hidden(input_ids=tokens, attention_mask=mask)[:, :-1],
            policy.weight,
            reference.hidden(input_ids=tokens, attention_mask=mask)[:, :-1],
            reference.weight,
            labels,
        )
        rewards = self.reward(self.tokenizer.batch_decode(tokens))
        return {"reward": float(rewards.mean()), "kl": divergence.per_sequence().kl.mean().item()}

    def continuations(self, model: GPT2LMHeadModel, count: int = 3) -> list[str]:
        """The first `count` prompts, continued by a model."""
        prompts = self.prompts[:count]
        responses = sample(model, prompts, self.settings.response_tokens, self.settings.seed + 3)
        return self.tokenizer.batch_decode(torch.cat([prompts, responses], 1))


class FrontierCallback(TrainerCallback):
    """Judges the policy every `every` steps and keeps the curve in a file beside the checkpoints."""

    def __init__(self, judge: Judge, path: Path, every: int, progress: tqdm):
        self.judge, self.path, self.every, self.progress = judge, path, every, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.progress.update(state.global_step)
        if state.global_step == 0:
            self._judge(model, 0)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.progress.update(1)
        if state.global_step % self.every == 0:
            self._judge(model, state.global_step)

    def _judge(self, model: GPT2LMHeadModel, step: int) -> None:
        points = json.loads(self.path.read_text()) if self.path.exists() else []
        earlier = [point for point in points if point["step"] < step]  # a resumed run repeats steps
        point = {"step": step, **self.judge(model)}
        self.progress.set_postfix(reward=f"{point['reward']:.3f}", kl=f"{point['kl']:.2f}")
        write_json(self.path, [*earlier, point])
