"""The experiment, stage by stage. A finished stage leaves its files and is not run again."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from datasets import Dataset, disable_progress_bars
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tdpo_ext import linear_token_divergence

from ..config import TDPOConfig
from ..head import LanguageModelHead
from ..trainer import TDPOTrainer
from .language_model import pretrain, sample, train_tokenizer
from .report import report
from .reviews import Reward, load_reviews, sentences
from .settings import DemoSettings

PROMPT_TOKENS = 5


def run(settings: DemoSettings) -> None:
    """Runs what is not done yet of the experiment that `settings` describe, then reports."""
    started = time.monotonic()
    experiment = Experiment(settings)
    for method in settings.methods:
        experiment.train(method, method, settings.alpha)
    report(settings, experiment.out, experiment.examples(), time.monotonic() - started)


class Experiment:
    """The start that all methods share: reviews, reward, base model, preference pairs, and a judge."""

    def __init__(self, settings: DemoSettings):
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()
        self.settings, self.out = settings, Path(settings.out).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        _keep_settings(settings, self.out)

        print("Reviews and reward classifier ...", flush=True)
        reviews = load_reviews(settings.reviews, settings.seed)
        reward = Reward.fit(reviews)
        print(f"  {len(reviews):,} reviews; the classifier is right on {reward.held_out_accuracy:.1%} of held-out ones")
        texts = sentences(reviews["text"].tolist())

        model, self.tokenizer = _base_model(settings, self.out, texts)
        prompts = _prompts(self.tokenizer, texts, settings.prompts + settings.eval_prompts)
        self.pairs = _pairs(settings, self.out, model, self.tokenizer, reward, prompts[: settings.prompts])
        self.judge = Judge(settings, self.tokenizer, reward, prompts[settings.prompts :], model)

    def train(self, name: str, variant: str, alpha: float) -> list[dict]:
        """Trains one method from the base model under `out`/`name`, unless that is done; its frontier."""
        _train(self, self.out / name, variant, alpha)
        return json.loads((self.out / name / "frontier.json").read_text())

    def examples(self) -> dict[str, list[str]]:
        """A few prompts continued by the base model and by each trained policy."""
        return self.judge.examples(self.out, self.settings.methods)


def _write(path: Path, content: dict | list) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)


def _keep_settings(settings: DemoSettings, out: Path) -> None:
    """Refuses to mix the files of two different experiments in one directory."""
    path = out / "settings.json"
    mine = {name: value for name, value in asdict(settings).items() if name not in ("out", "methods")}
    if path.exists() and json.loads(path.read_text()) != mine:
        raise ValueError(f"out is {settings.out}, which holds a run with other settings; give another --out")
    _write(path, mine)


def _base_model(settings: DemoSettings, out: Path, texts: list[str]):
    path = out / "base"
    if not path.exists():
        tokenizer = train_tokenizer(texts)
        model = pretrain(texts, tokenizer, settings.pretrain_steps, settings.seed)
        part = out / "base.part"
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(path)
    return GPT2LMHeadModel.from_pretrained(path).eval(), PreTrainedTokenizerFast.from_pretrained(path)


def _prompts(tokenizer, texts: list[str], count: int) -> Tensor:
    """The first tokens of `count` sentences: (count, PROMPT_TOKENS)."""
    prompts = []
    for text in texts:
        ids = tokenizer(text)["input_ids"][:PROMPT_TOKENS]
        if len(ids) == PROMPT_TOKENS:
            prompts.append(ids)
            if len(prompts) == count:
                return torch.tensor(prompts)
    raise ValueError(f"prompts and eval_prompts ask for {count} sentences; there are {len(prompts)}")


def _pairs(settings: DemoSettings, out: Path, model, tokenizer, reward: Reward, prompts: Tensor) -> Dataset:
    """The best and the worst of each prompt's samples, as texts."""
    path = out / "pairs.json"
    if not path.exists():
        repeated = prompts.repeat_interleave(settings.samples, 0)
        responses = sample(model, repeated, settings.response_tokens, settings.seed + 1, "Sampling preference pairs")
        scores = reward(tokenizer.batch_decode(torch.cat([repeated, responses], 1)))
        scores = torch.tensor(scores).view(len(prompts), settings.samples)
        texts = tokenizer.batch_decode(responses)
        rows = []
        for index, prompt in enumerate(tokenizer.batch_decode(prompts)):
            best, worst = scores[index].argmax().item(), scores[index].argmin().item()
            first = index * settings.samples
            if scores[index, best] - scores[index, worst] > 0.1:
                rows.append({"prompt": prompt, "chosen": texts[first + best], "rejected": texts[first + worst]})
        _write(path, rows)
    rows = json.loads(path.read_text())
    print(f"  {len(rows)} preference pairs")
    return Dataset.from_list(rows)


class Judge:
    """Reward and sequence KL of a policy, on samples for prompts that were not trained on."""

    def __init__(self, settings: DemoSettings, tokenizer, reward: Reward, prompts: Tensor, reference: GPT2LMHeadModel):
        self.settings, self.tokenizer, self.reward, self.prompts = settings, tokenizer, reward, prompts
        self.reference = LanguageModelHead.of(reference)

    @torch.no_grad()
    def __call__(self, model: GPT2LMHeadModel) -> dict[str, float]:
        """Mean reward of samples, and their mean sequence KL(reference || policy), in nats."""
        responses = sample(model, self.prompts, self.settings.response_tokens, self.settings.seed + 2)
        tokens = torch.cat([self.prompts, responses], 1)
        mask = torch.ones_like(tokens)
        policy, reference = LanguageModelHead.of(model), self.reference
        labels = tokens[:, 1:].clone()
        labels[:, : PROMPT_TOKENS - 1] = -100
        divergence = linear_token_divergence(
            policy.hidden(input_ids=tokens, attention_mask=mask)[:, :-1],
            policy.weight,
            reference.hidden(input_ids=tokens, attention_mask=mask)[:, :-1],
            reference.weight,
            labels,
        )
        rewards = self.reward(self.tokenizer.batch_decode(tokens))
        return {"reward": float(rewards.mean()), "kl": divergence.per_sequence().kl.mean().item()}

    def examples(self, out: Path, methods: tuple[str, ...], count: int = 3) -> dict[str, list[str]]:
        """A few prompts continued by the base model and by each trained policy."""
        policies = {"before": self.reference.model}
        policies |= {method: GPT2LMHeadModel.from_pretrained(out / method / "model") for method in methods}
        prompts = self.prompts[:count]
        return {
            name: self.tokenizer.batch_decode(
                torch.cat([prompts, sample(model, prompts, self.settings.response_tokens, self.settings.seed + 3)], 1)
            )
            for name, model in policies.items()
        }


class FrontierCallback(TrainerCallback):
    """Judges the policy every `eval_every` steps and keeps the curve in a file beside the checkpoints."""

    def __init__(self, judge: Judge, path: Path, every: int, progress: tqdm):
        self.judge, self.path, self.every, self.progress = judge, path, every, progress

    def on_train_begin(self, args, state, control, model=None, **_):
        self.progress.update(state.global_step)
        if state.global_step == 0:
            self._judge(model, 0)

    def on_step_end(self, args, state, control, model=None, **_):
        self.progress.update(1)
        if state.global_step % self.every == 0:
            self._judge(model, state.global_step)

    def _judge(self, model, step: int) -> None:
        points = json.loads(self.path.read_text()) if self.path.exists() else []
        point = {"step": step, **self.judge(model)}
        self.progress.set_postfix(reward=f"{point['reward']:.3f}", kl=f"{point['kl']:.2f}")
        _write(self.path, [*(p for p in points if p["step"] < step), point])


def _train(experiment: Experiment, home: Path, variant: str, alpha: float) -> None:
    """One method from the base model, through the public trainer; goes on from its last checkpoint."""
    settings, tokenizer = experiment.settings, experiment.tokenizer
    if (home / "model").exists():
        return
    model = GPT2LMHeadModel.from_pretrained(experiment.out / "base")
    args = TDPOConfig(
        output_dir=str(home / "checkpoints"),
        variant=variant,
        beta=settings.beta,
        alpha=alpha,
        learning_rate=settings.learning_rate,
        per_device_train_batch_size=settings.batch_pairs,
        max_steps=settings.steps,
        save_steps=settings.eval_every,
        save_total_limit=1,
        warmup_steps=settings.steps // 10,
        max_length=PROMPT_TOKENS + settings.response_tokens + 8,
        max_prompt_length=PROMPT_TOKENS + 3,
        seed=settings.seed,
        logging_steps=10,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    last = get_last_checkpoint(args.output_dir) if Path(args.output_dir).exists() else None
    with tqdm(total=settings.steps, desc=f"Training {home.name.upper():5s}") as progress:
        callback = FrontierCallback(experiment.judge, home / "frontier.json", settings.eval_every, progress)
        trainer = TDPOTrainer(
            model, args=args, train_dataset=experiment.pairs, processing_class=tokenizer, callbacks=[callback]
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=last)
    _write(home / "log.json", trainer.state.log_history)
    part = home / "model.part"
    trainer.model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    part.rename(home / "model")
