"""The experiment, stage by stage. A finished stage leaves its files behind and is not run again."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..config import TDPOConfig
from ..files import save_model, write_json
from ..progress import library_bars
from ..runs.checkpoints import checkpoints_of
from ..trainer import TDPOTrainer
from .base import load_policy, prepare_base
from .evaluation import Evaluation, load_evaluations
from .judge import FrontierCallback, Judge
from .report import report
from .results import Results
from .reviews import Reward, load_reviews, sentences
from .sampling import sample
from .settings import DemoSettings, Method

EVALUATIONS = "evaluations.json"  # in the folder of a method


def run(settings: DemoSettings) -> None:
    """Runs the stages of the experiment that are not finished yet, then reports."""
    started = time.monotonic()
    with quiet_libraries():
        experiment = Experiment(settings)
        for method in settings.methods:
            experiment.train(method, settings.method(method))
        report(settings, experiment.out, experiment.results(), time.monotonic() - started)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Leaves the screen to what the stages print: no bars or warnings of `datasets` and transformers meanwhile."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        with library_bars(shown=False):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


class Experiment:
    """What all methods share: reviews, reward, base model, preference pairs, and a judge."""

    def __init__(self, settings: DemoSettings):
        self.settings, self.out = settings, Path(settings.out).absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self._check_settings()

        print("Reviews and reward classifier ...", flush=True)
        reviews = load_reviews(settings.reviews, settings.seed)
        reward = Reward.fit(reviews)
        print(f"  {len(reviews):,} reviews; held-out accuracy of the classifier: {reward.held_out_accuracy:.1%}")
        texts = sentences(reviews["text"].tolist())

        self.base = prepare_base(settings, self.out, texts)
        model = self._start().eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base)
        prompts = _prompts(self.tokenizer, texts, settings.prompts + settings.eval_prompts, settings.prompt_tokens)
        self.pairs = self._preference_pairs(model, reward, prompts[: settings.prompts])
        self.judge = Judge(settings, self.tokenizer, reward, prompts[settings.prompts :], model)

    def _start(self) -> PreTrainedModel:
        """The base model, in float32 where all of it is trained: a step is small for bfloat16."""
        return load_policy(self.base, dtype="auto" if self.settings.lora_r else "float32")

    def _check_settings(self) -> None:
        """Refuses to mix the files of two different experiments in one directory."""
        path = self.out / "settings.json"
        mine = {name: value for name, value in asdict(self.settings).items() if name not in ("out", "methods")}
        if path.exists() and json.loads(path.read_text()) != mine:
            raise ValueError(
                f"out is {self.settings.out}, which holds a run with other settings; give another directory"
            )
        write_json(path, mine)

    def _preference_pairs(self, model: PreTrainedModel, reward: Reward, prompts: Tensor) -> Dataset:
        """The best and the worst of each prompt's samples, as texts to read and as token ids to train on.

        Token ids, because responses that were cut off at a number of tokens should not be taught to end there.
        """
        path = self.out / "pairs.json"
        if not path.exists():
            write_json(path, self._sample_pairs(model, reward, prompts))
        rows = json.loads(path.read_text())
        print(f"  {len(rows)} preference pairs")
        return Dataset.from_list(rows)

    def _sample_pairs(self, model: PreTrainedModel, reward: Reward, prompts: Tensor) -> list[dict[str, Any]]:
        settings, tokenizer = self.settings, self.tokenizer
        repeated = prompts.repeat_interleave(settings.samples, 0)
        responses = sample(model, repeated, settings.response_tokens, settings.seed + 1, "Sampling preference pairs")
        whole = tokenizer.batch_decode(torch.cat([repeated, responses], 1), skip_special_tokens=True)
        scores = torch.tensor(reward(whole)).view(len(prompts), settings.samples)
        responses = responses.view(len(prompts), settings.samples, settings.response_tokens)
        rows = []
        for prompt, candidates, score in zip(prompts, responses, scores):
            if score.max() - score.min() > 0.1:
                parts = {"prompt": prompt, "chosen": candidates[score.argmax()], "rejected": candidates[score.argmin()]}
                rows.append({name: tokenizer.decode(ids) for name, ids in parts.items()})
                rows[-1] |= {f"{name}_ids": ids.tolist() for name, ids in parts.items()}
        return rows

    def train(self, name: str, method: Method) -> list[Evaluation]:
        """Trains one method from the base model under `out`/`name`, unless that is done, and returns its evaluations.

        An interrupted training resumes from its last checkpoint.
        """
        home = self.out / name
        if not (home / "model").exists():
            self._train(home, method)
        return load_evaluations(home / EVALUATIONS)

    def _train(self, home: Path, method: Method) -> None:
        settings = self.settings
        args = TDPOConfig(
            output_dir=str(home / "checkpoints"),
            variant=method.variant,
            beta=method.beta,
            alpha=method.alpha if method.variant == "tdpo2" else TDPOConfig.alpha,
            learning_rate=settings.learning_rate,
            per_device_train_batch_size=settings.batch_pairs,
            max_steps=settings.steps,
            save_steps=settings.eval_every,
            save_total_limit=1,
            warmup_steps=settings.steps // 10,
            max_length=settings.prompt_tokens + settings.response_tokens,
            max_prompt_length=settings.prompt_tokens,
            seed=settings.seed,
            logging_steps=1,
            report_to=[],
            audit="first" if home.name == settings.methods[0] else "never",
            precompute_reference=True,  # once for all methods
            reference_cache=str(self.out / "reference-cache"),
            reference_dtype="float32",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        interrupted = bool(checkpoints_of(args.output_dir))
        with tqdm(total=settings.steps, desc=f"Training {home.name.upper():5s}") as progress:
            callback = FrontierCallback(self.judge, home / EVALUATIONS, settings.eval_every, progress)
            trainer = TDPOTrainer(
                self._start(),
                args=args,
                train_dataset=self.pairs,
                processing_class=self.tokenizer,
                peft_config=self._adapters(),
                callbacks=[callback],
            )
            trainer.remove_callback(transformers.PrinterCallback)
            trainer.train(resume_from_checkpoint=interrupted)
        write_json(home / "log.json", trainer.state.log_history)
        save_model(home / "model", trainer.model, self.tokenizer)

    def _adapters(self) -> Any:
        """The peft config of the adapters to train, or None for the whole model."""
        if self.settings.lora_r == 0:
            return None
        from peft import LoraConfig

        rank = self.settings.lora_r
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=rank, target_modules="all-linear")

    def results(self) -> Results:
        """What the methods of this demo, which are trained, wrote and earned."""
        evaluations = {name: load_evaluations(self.out / name / EVALUATIONS) for name in self.settings.methods}
        return Results(self.judge.decode(self.judge.prompts), evaluations)


def _prompts(tokenizer: PreTrainedTokenizerBase, texts: list[str], count: int, tokens: int) -> Tensor:
    """The first tokens of `count` sentences: (count, tokens)."""
    prompts: list[list[int]] = []
    for text in texts:
        if len(prompts) == count:
            break
        ids = tokenizer(text)["input_ids"][:tokens]
        if len(ids) == tokens:
            prompts.append(ids)
    if len(prompts) < count:
        raise ValueError(f"prompts and eval_prompts ask for {count} sentences; there are {len(prompts)}")
    return torch.tensor(prompts)
