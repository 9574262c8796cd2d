"""TDPO on transformers.Trainer: its loop and logging; our loss, reference, metrics and whole checkpoints."""

from __future__ import annotations

import contextlib
import copy
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import Trainer

from . import checkpoints
from .config import TDPOConfig
from .data import PreferenceCollator, padding_token, tokenize_preferences
from .head import FrozenHead, LanguageModelHead
from .loss import PreferenceLoss, install
from .metrics import MetricMeans, preference_metrics
from .model_card import model_card
from .reference import ReferenceCache, cache_reference
from .samples import show_samples

Splits = dict[str, Dataset]


class TDPOTrainer(Trainer):
    """Trains a causal language model on preference pairs.

    Args:
        model: the policy, an AutoModelForCausalLM or a peft model.
        ref_model: the frozen reference. None takes the policy as it is now: with adapters, the model without them;
            otherwise a copy, or, with `precompute_reference`, only its head.
        args: options.
        train_dataset, eval_dataset: preference rows (see `tdpo.data`); eval_dataset may be a dict of splits.
        processing_class: the tokenizer.
        peft_config: adapters to train instead of the whole policy, such as `peft.LoraConfig`.
        others: as in `transformers.Trainer`.

    Raises:
        ValueError: bad data or tokenizer (see `tokenize_preferences`), a reference with another vocabulary, a stale or
            torn reference cache, or a model that can't do without padding.
        FloatingPointError: while training, a loss that isn't finite; the message names the rows of the batch.
    """

    data_collator: Any
    _staging: str | None = None  # where a checkpoint is being written

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        args: TDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Splits | None = None,
        processing_class=None,
        peft_config=None,
        **others,
    ) -> None:
        args = TDPOConfig(output_dir="out") if args is None else args
        if processing_class is None:
            raise ValueError("processing_class is None; a tokenizer is needed")
        self._pad_token_id = padding_token(processing_class)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        self._has_adapters = hasattr(model, "disable_adapter")
        if self._has_adapters and args.gradient_checkpointing:
            model.enable_input_require_grads()  # type: ignore[operator]
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0

        def tokenized(dataset: Dataset) -> Dataset:
            limits = (args.max_length, args.max_prompt_length)
            return tokenize_preferences(dataset, processing_class, *limits, overlong=args.overlong)

        train = None if train_dataset is None else tokenized(train_dataset)
        evals: Any = eval_dataset
        if isinstance(eval_dataset, dict):
            evals = {name: tokenized(split) for name, split in eval_dataset.items()}
        elif eval_dataset is not None:
            evals = tokenized(eval_dataset)
        self._means = MetricMeans()
        super().__init__(
            model=model,
            args=args,
            data_collator=others.pop("data_collator", PreferenceCollator(self._pad_token_id, args.padding_free)),
            train_dataset=train,
            eval_dataset=evals,
            processing_class=processing_class,
            **others,
        )
        # The loss is a mean over pairs: gradient accumulation divides it, nothing is normalised by tokens.
        self.model_accepts_loss_kwargs = False
        self._set_up_loss(ref_model)

    def _set_up_loss(self, ref_model: nn.Module | None) -> None:
        policy = LanguageModelHead.of(self.model)
        if self.args.padding_free and not policy.keeps_sequences_apart():
            raise ValueError(
                "padding_free: this model lets packed sequences see each other (with attention "
                f"{self.model.config._attn_implementation!r}); choose another attn_implementation, or padding"
            )
        self._caches: dict[int, ReferenceCache] = {}
        without_adapters: Any = contextlib.nullcontext
        self.ref_model: nn.Module | None = None
        reference: LanguageModelHead | FrozenHead
        if self.args.precompute_reference:
            reference = self._cached_reference(self.model if ref_model is None else ref_model)
        elif ref_model is None and self._has_adapters:
            reference, without_adapters = policy, self.model.disable_adapter
        else:
            ref_model = copy.deepcopy(self.model) if ref_model is None else ref_model
            self.ref_model = ref_model.to(self.args.device).eval().requires_grad_(False)
            reference = LanguageModelHead.of(self.ref_model)
        if policy.vocab != reference.vocab:
            raise ValueError(f"ref_model has a vocabulary of {reference.vocab} but model has {policy.vocab}")
        self.loss = PreferenceLoss(
            policy, reference, self.args.objective(), self.args.logits_budget, without_adapters=without_adapters
        )
        if self.loss.obstacle is not None:
            if self.args.precompute_reference:
                raise ValueError(
                    f"precompute_reference needs the fused loss, which can't be used: {self.loss.obstacle}"
                )
            warnings.warn(
                f"the fused loss can't be used, logits are materialised instead: {self.loss.obstacle}", stacklevel=3
            )
        install(self.model, self.loss)

    # ---- the reference on disk ----

    def _cached_reference(self, model: nn.Module) -> FrozenHead:
        """Fills or opens the cache of every split; of the reference only the head is kept."""
        folder = self.args.reference_folder
        evals = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        splits = {"train": self.train_dataset, **{name: split for name, split in evals.items()}}
        without = model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext()
        with without, self.args.main_process_first(local=False, desc="caching the reference"):
            model = model.to(self.args.device)  # type: ignore[assignment]
            for name, split in splits.items():
                if split is not None:
                    self._caches[id(split)] = cache_reference(
                        folder / name, model, split, self._pad_token_id, self.args.reference_dtype
                    )
        return FrozenHead.of(LanguageModelHead.of(model))

    def _with_cache(self, dataset: Any, loader) -> Any:
        """The data loader, its collator adding what is cached of `dataset`."""
        cache = self._caches.get(id(dataset))
        if self.args.precompute_reference and cache is None:
            raise ValueError(
                "precompute_reference: this dataset was not given to the trainer, so nothing is cached of it"
            )
        collator = self.data_collator
        try:
            if cache is not None:
                self.data_collator = replace(collator, reference_cache=cache)
            return loader()
        finally:
            self.data_collator = collator

    def get_train_dataloader(self):
        return self._with_cache(self.train_dataset, super().get_train_dataloader)

    def get_eval_dataloader(self, eval_dataset=None):
        found = self.eval_dataset if eval_dataset is None else eval_dataset
        found = self.eval_dataset[found] if isinstance(found, str) else found
        return self._with_cache(found, lambda: super(TDPOTrainer, self).get_eval_dataloader(eval_dataset))

    # ---- loss and metrics ----

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss of a batch; its metrics are kept for the next log."""
        output = model(preference=inputs)
        loss = output.loss
        if not torch.isfinite(loss):
            rows = inputs["index"].tolist()
            last = checkpoints.last_good(self.args.output_dir) or "none"
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, on rows {rows} of the dataset; "
                f"training stops; last good checkpoint: {last}"
            )
        metrics = preference_metrics(output, inputs["cu_seqlens"].diff(), self.args.beta)
        if not self.model.training:
            pairs = len(inputs["index"])
            metrics["loss"] = (loss.detach() * pairs, pairs)
        self._means.add("train" if self.model.training else "eval", metrics)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation needs the loss and the metrics, no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args, **kwargs):
        self._means.take("eval", self._sum_over_processes)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        means = self._means.take("eval", self._sum_over_processes)
        output.metrics.update({f"{prefix}_{name}": value for name, value in means.items()})
        if self.args.eval_samples:
            show_samples(self, kwargs.get("dataloader") or args[0], prefix)
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means since the last log to what the training loop logs."""
        if "loss" in logs:
            logs.update(self._means.take("train", self._sum_over_processes))
        super().log(logs, *args, **kwargs)

    def _sum_over_processes(self, sums):
        return self.accelerator.reduce(sums.float(), "sum")

    # ---- saving ----

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        """A checkpoint appears under its name only when all of it is written."""
        with checkpoints.whole(self) as self._staging:
            super()._save_checkpoint(model, trial)
        self._staging = None

    def _save(self, output_dir: str | None = None, state_dict=None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "README.md").write_text(model_card(self.model, self.args))
