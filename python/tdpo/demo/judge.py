"""Evaluation of a policy during and after training: what it writes, its reward and its KL."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tdpo_ext import linear_token_divergence

from ..models.causal_lm import CausalLM
from .evaluation import Evaluation, load_evaluations, save_evaluations
from .reviews import Reward
from .sampling import sample
from .settings import DemoSettings

_SEQUENCES = 64  # of which hidden states are computed together


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
    def before(self) -> Evaluation:
        """The reference itself, as which every policy starts: its KL is 0."""
        responses = self._respond(self.reference.model)  # type: ignore[arg-type]
        return self._evaluation(0, responses, [0.0] * len(self.prompts[: self.settings.kl_prompts]))

    @torch.no_grad()
    def __call__(self, model: PreTrainedModel, step: int) -> Evaluation:
        """What a policy writes after the prompts, with its rewards, and KLs for the first `kl_prompts` of them."""
        responses = self._respond(model)
        tokens = torch.cat([self.prompts, responses], 1)[: self.settings.kl_prompts]
        was_training = model.training
        model.eval()
        policy = CausalLM.of(model)
        kls = torch.cat([self._sequence_kl(policy, part.to(model.device)) for part in tokens.split(_SEQUENCES)])
        model.train(was_training)
        return self._evaluation(step, responses, kls.tolist())

    def _respond(self, model: PreTrainedModel) -> Tensor:
        return sample(model, self.prompts, self.settings.response_tokens, self.settings.seed + 2)

    def _evaluation(self, step: int, responses: Tensor, kls: list[float]) -> Evaluation:
        whole = self.decode(torch.cat([self.prompts, responses], 1))
        return Evaluation(step=step, texts=self.decode(responses), rewards=self.reward(whole).tolist(), kls=kls)

    def decode(self, tokens: Tensor) -> list[str]:
        return self.tokenizer.batch_decode(tokens, skip_special_tokens=True)

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


class FrontierCallback(TrainerCallback):
    """Judges the policy every `every` steps and keeps the evaluations in a file beside the checkpoints."""

    def __init__(self, judge: Judge, path: Path, every: int, progress: tqdm):
        self.judge, self.path, self.every, self.progress = judge, path, every, progress

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.progress.update(state.global_step)
        if state.global_step == 0:
            self._add(self.judge.before)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.progress.update(1)
        if state.global_step % self.every == 0:
            self._add(self.judge(model, state.global_step))

    def _add(self, evaluation: Evaluation) -> None:
        # A resumed run repeats steps.
        earlier = [other for other in load_evaluations(self.path) if other.step < evaluation.step]
        point = evaluation.point()
        self.progress.set_postfix(reward=f"{point['reward']:.3f}", kl=f"{point['kl']:.2f}")
        save_evaluations(self.path, [*earlier, evaluation])
