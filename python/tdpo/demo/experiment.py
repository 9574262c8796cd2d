"""The experiment, stage by stage. A finished stage leaves its files behind and is not run again."""

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
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from ..checkpoints import checkpoints_of
from ..config import TDPOConfig
from ..files import save_model, write_json
from ..trainer import TDPOTrainer
from .judge import FrontierCallback, Judge
from .language_model import pretrain, sample, train_tokenizer
from .report import report
from .reviews import Reward, load_reviews, sentences
from .settings import DemoSettings

PROMPT_TOKENS = 5


def run(settings: DemoSettings) -> None:
    """Runs the stages of the experiment that are not finished yet, then reports."""
    started = time.monotonic()
    experiment = Experiment(settings)
    for method in settings.methods:
        experiment.train(method, method, settings.alpha)
    report(settings, experiment.out, experiment.examples(), time.monotonic() - started)


class Experiment:
    """What all methods share: reviews, reward, base model, preference pairs, and a judge."""

    def __init__(self, settings: DemoSettings):
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        disable_progress_bars()
        self.settings, self.out = settings, Path(settings.out).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self._check_settings()

        print("Reviews and reward classifier ...", flush=True)
        reviews = load_reviews(settings.reviews, settings.seed)
        reward = Reward.fit(reviews)
        print(f"  {len(reviews):,} reviews; held-out accuracy of the classifier: {reward.held_out_accuracy:.1%}")
        texts = sentences(reviews["text"].tolist())

        self.base = self.out / "base"
        self._pretrain_base(texts)
        model = self.base_model().eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(self.base)
        prompts = _prompts(self.tokenizer, texts, settings.prompts + settings.eval_prompts)
        self.pairs = self._preference_pairs(model, reward, prompts[: settings.prompts])
        self.judge = Judge(settings, self.tokenizer, reward, prompts[settings.prompts :], model)

    def _check_settings(self) -> None:
        """Refuses to mix the files of two different experiments in one directory."""
        path = self.out / "settings.json"
        mine = {name: value for name, value in asdict(self.settings).items() if name not in ("out", "methods")}
        if path.exists() and json.loads(path.read_text()) != mine:
            raise ValueError(
                f"out is {self.settings.out}, which holds a run with other settings; give another directory"
            )
        write_json(path, mine)

    def _pretrain_base(self, texts: list[str]) -> None:
        if self.base.exists():
            return
        tokenizer = train_tokenizer(texts)
        model = pretrain(texts, tokenizer, self.settings.pretrain_steps, self.settings.seed)
        save_model(self.base, model, tokenizer)

    def base_model(self) -> GPT2LMHeadModel:
        """A fresh copy of the model that all methods start from."""
        return GPT2LMHeadModel.from_pretrained(self.base)

    def _preference_pairs(self, model: GPT2LMHeadModel, reward: Reward, prompts: Tensor) -> Dataset:
        """The best and the worst of each prompt's samples, as texts."""
        path = self.out / "pairs.json"
        if not path.exists():
            write_json(path, self._sample_pairs(model, reward, prompts))
        rows = json.loads(path.read_text())
        print(f"  {len(rows)} preference pairs")
        return Dataset.from_list(rows)

    def _sample_pairs(self, model: GPT2LMHeadModel, reward: Reward, prompts: Tensor) -> list[dict[str, str]]:
        settings, tokenizer = self.settings, self.tokenizer
        repeated = prompts.repeat_interleave(settings.samples, 0)
        responses = sample(model, repeated, settings.response_tokens, settings.seed + 1, "Sampling preference pairs")
        scores = torch.tensor(reward(tokenizer.batch_decode(torch.cat([repeated, responses], 1))))
        scores = scores.view(len(prompts), settings.samples)
        texts = tokenizer.batch_decode(responses)
        rows = []
        for index, prompt in enumerate(tokenizer.batch_decode(prompts)):
            best, worst = scores[index].argmax().item(), scores[index].argmin().item()
            first = index * settings.samples
            if scores[index, best] - scores[index, worst] > 0.1:
                rows.append({"prompt": prompt, "chosen": texts[first + best], "rejected": texts[first + worst]})
        return rows

    def train(self, name: str, variant: str, alpha: float) -> list[dict[str, float]]:
        """Trains one method from the base model under `out`/`name`, unless that is done, and returns its frontier.

        An interrupted training resumes from its last checkpoint.
        """
        home = self.out / name
        if not (home / "model").exists():
            self._train(home, variant, alpha)
        return json.loads((home / "frontier.json").read_text())

    def _train(self, home: Path, variant: str, alpha: float) -> None:
        settings = self.settings
        args = TDPOConfig(
            output_dir=str(home / "checkpoints"),
            variant=variant,
            beta=settings.beta,
            alpha=alpha if variant == "tdpo2" else TDPOConfig.alpha,
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
        interrupted = bool(checkpoints_of(args.output_dir))
        with tqdm(total=settings.steps, desc=f"Training {home.name.upper():5s}") as progress:
            callback = FrontierCallback(self.judge, home / "frontier.json", settings.eval_every, progress)
            trainer = TDPOTrainer(
                self.base_model(),
                args=args,
                train_dataset=self.pairs,
                processing_class=self.tokenizer,
                callbacks=[callback],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train(resume_from_checkpoint=interrupted)
        write_json(home / "log.json", trainer.state.log_history)
        save_model(home / "model", trainer.model, self.tokenizer)

    def examples(self) -> dict[str, list[str]]:
        """A few prompts continued by the base model ("before") and by each trained policy."""
        policies = {"before": self.judge.reference.model}
        for method in self.settings.methods:
            policies[method] = GPT2LMHeadModel.from_pretrained(self.out / method / "model")
        return {name: self.judge.continuations(model) for name, model in policies.items()}


def _prompts(tokenizer: PreTrainedTokenizerFast, texts: list[str], count: int) -> Tensor:
    """The first tokens of `count` sentences: (count, PROMPT_TOKENS)."""
    prompts: list[list[int]] = []
    for text in texts:
        if len(prompts) == count:
            break
        ids = tokenizer(text)["input_ids"][:PROMPT_TOKENS]
        if len(ids) == PROMPT_TOKENS:
            prompts.append(ids)
    if len(prompts) < count:
        raise ValueError(f"prompts and eval_prompts ask for {count} sentences; there are {len(prompts)}")
    return torch.tensor(prompts)
