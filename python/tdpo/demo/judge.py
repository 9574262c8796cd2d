"""Evaluation of a policy during and after training: its reward, its KL, and examples of what it writes."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tdpo_ext import linear_token_divergence

from ..files import write_json
from ..models.causal_lm import CausalLM
from .base import sample
from .reviews import Reward
from .settings import DemoSettings

_SEQUENCES = 64  # of which hidden states are computed together
_KL_SEQUENCES = 256  # of which the KL is measured: a sum of exact expectations, it needs fewer samples than the reward


class Example(NamedTuple):
    """A prompt's continuation and its reward."""

    prompt: str
    continuation: str
    reward: float


class Judge:
    """Reward and sequence KL of a policy, on samples for prompts that were not trained on."""

    def __init__(
        self,
        settings: DemoSettings,
        tokenizer: PreTrainedTokenizerBase,
        reward: Reward,
        prompts: Tensor,  # (n, P)
        reference: PreTrainedModel,
    ):
        self.settings, self.tokenizer, self.reward, self.prompts = settings, tokenizer, reward, prompts
        self.reference = CausalLM.of(reference)

    @functools.cached_property
    def before(self) -> dict[str, float]:
        """The figures of the reference itself, which are those of every policy before it is trained."""
        return self(self.reference.model)  # type: ignore[arg-type]

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel) -> dict[str, float]:
        """Of samples: mean reward, its standard error, and mean sequence KL(reference || policy) in nats."""
        responses = sample(model, self.prompts, self.settings.response_tokens, self.settings.seed + 2)
        tokens = torch.cat([self.prompts, responses], 1)
        was_training = model.training
        model.eval()
        policy = CausalLM.of(model)
        parts = tokens[:_KL_SEQUENCES].split(_SEQUENCES)
        kl = torch.cat([self._sequence_kl(policy, part.to(model.device)) for part in parts])
        model.train(was_training)
        rewards = self.reward(self.tokenizer.batch_decode(tokens, skip_special_tokens=True))
        return {
            "reward": float(rewards.mean()),
            "reward_error": float(rewards.std() / len(rewards) ** 0.5),
            "kl": kl.mean().item(),
        }

    def _sequence_kl(self, policy: CausalLM, tokens: Tensor) -> Tensor:
        """(n,) of tokens (n, T)."""
        mask, reference = torch.ones_like(tokens), self.reference
        labels = tokens[:, 1:].clone()
        labels[:, : self.prompts.shape[1] - 1] = -100
        divergence = linear_token_divergence(
            policy.hidden(input_ids=tokens, attention_mask=mask)[:, :-1],
            policy.weight,
            reference.hidden(input_ids=tokens, attention_mask=mask)[:, :-1],
            reference.weight,
            labels,
            bias=policy.bias,
            ref_bias=reference.bias,
            softcap=policy.softcap,
            logit_scale=policy.logit_scale,
            ref_logit_scale=reference.logit_scale,
        )
        return divergence.per_sequence().kl

    def examples(self, model: PreTrainedModel, count: int = 4) -> list[Example]:
        """The first `count` prompts, continued by a model."""
        prompts = self.prompts[:count]
        responses = sample(model, prompts, self.settings.response_tokens, self.settings.seed + 3)
        whole, beginnings, endings = (
            self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
            for tokens in (torch.cat([prompts, responses], 1), prompts, responses)
        )
        return [Example(*parts) for parts in zip(beginnings, endings, self.reward(whole).tolist())]


class FrontierCallback(TrainerCallback):
    """Judges the policy every `every` steps and keeps the curve in a file beside the checkpoints."""

    def __init__(self, judge: Judge, path: Path, every: int, progress: tqdm):
        self.judge, self.path, self.every, self.progress = judge, path, every, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.progress.update(state.global_step)
        if state.global_step == 0:
            self._write(0, self.judge.before)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.progress.update(1)
        if state.global_step % self.every == 0:
            self._write(state.global_step, self.judge(model))

    def _write(self, step: int, figures: dict[str, float]) -> None:
        points = json.loads(self.path.read_text()) if self.path.exists() else []
        earlier = [point for point in points if point["step"] < step]  # a resumed run repeats steps
        point = {"step": step, **figures}
        self.progress.set_postfix(reward=f"{point['reward']:.3f}", kl=f"{point['kl']:.2f}")
        write_json(self.path, [*earlier, point])
