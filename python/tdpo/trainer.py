"""TDPO on transformers.Trainer: its loop, checkpoints and logging; our loss, reference and metrics."""

from __future__ import annotations

import copy
import warnings

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import Trainer

from tdpo_ext import TokenDivergence, linear_preference_loss, shift_labels, token_divergence

from .config import TDPOConfig
from .data import IGNORE_INDEX, PreferenceCollator, tokenize_preferences
from .head import LanguageModelHead
from .metrics import MetricMeans, preference_metrics


class TDPOTrainer(Trainer):
    """Trains a causal language model on preference pairs.

    Args:
        model: the policy, an AutoModelForCausalLM.
        ref_model: the frozen reference; None takes a copy of the policy as it is now.
        args: options.
        train_dataset, eval_dataset: rows of prompt, chosen and rejected texts; eval_dataset may be a dict of splits.
        processing_class: the tokenizer.
        others: as in `transformers.Trainer`.

    Raises:
        ValueError: bad data or tokenizer (see `tokenize_preferences`), or a reference with another vocabulary.
    """

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        args: TDPOConfig | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class=None,
        **others,
    ) -> None:
        if args is None:
            args = TDPOConfig(output_dir="out")
        if processing_class is None:
            raise ValueError("processing_class is None; a tokenizer is needed")
        pad = processing_class.pad_token_id
        collator = PreferenceCollator(processing_class.eos_token_id if pad is None else pad)

        def tokenized(dataset: Dataset | None) -> Dataset | None:
            if dataset is None:
                return None
            return tokenize_preferences(dataset, processing_class, args.max_length, args.max_prompt_length)

        evals: Dataset | dict[str, Dataset] | None
        if isinstance(eval_dataset, dict):
            evals = {name: tokenized(split) for name, split in eval_dataset.items()}
        else:
            evals = tokenized(eval_dataset)
        if args.disable_dropout:
            for module in model.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        self._objective = args.objective()
        self._means = MetricMeans()
        super().__init__(
            model=model,
            args=args,
            data_collator=others.pop("data_collator", collator),
            train_dataset=tokenized(train_dataset),
            eval_dataset=evals,
            processing_class=processing_class,
            **others,
        )
        # The loss is a mean over pairs: gradient accumulation divides it, nothing is normalised by tokens.
        self.model_accepts_loss_kwargs = False
        reference = copy.deepcopy(model) if ref_model is None else ref_model
        self.ref_model = reference.to(args.device).eval().requires_grad_(False)
        self._policy_head = LanguageModelHead.of(self.model)
        self._ref_head = LanguageModelHead.of(self.ref_model)
        if self._policy_head.vocab != self._ref_head.vocab:
            raise ValueError(
                f"ref_model has a vocabulary of {self._ref_head.vocab} but model has {self._policy_head.vocab}"
            )
        obstacle = self._policy_head.obstacle or self._ref_head.obstacle
        if obstacle is None and self._policy_head.softcap != self._ref_head.softcap:
            obstacle = "policy and reference cap their logits differently"
        self._fused = obstacle is None
        if not self._fused:
            warnings.warn(f"the fused loss can't be used, logits are materialised instead: {obstacle}", stacklevel=2)

    def preference_loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, TokenDivergence, TokenDivergence]:
        """(loss, chosen, rejected) of a batch from `PreferenceCollator`."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        labels = shift_labels(batch["labels"], IGNORE_INDEX)
        policy, reference = self._policy_head, self._ref_head
        if not self._fused:
            with torch.no_grad():
                ref_logits = reference.logits(**inputs)
            divergence = token_divergence(policy.logits(**inputs), ref_logits, labels, ignore_index=IGNORE_INDEX)
            chosen, rejected = divergence.per_sequence().chunk(2)
            return self._objective(chosen, rejected).mean(), chosen.detach(), rejected.detach()
        with torch.no_grad():
            ref_hidden = reference.hidden(**inputs)
        return linear_preference_loss(
            self._objective,
            policy.hidden(**inputs),
            policy.weight,
            ref_hidden,
            reference.weight,
            labels,
            bias=policy.bias,
            ref_bias=reference.bias,
            ignore_index=IGNORE_INDEX,
            softcap=policy.softcap,
            logits_budget=self.args.logits_budget,
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The mean loss of a batch; its metrics are kept for the next log."""
        loss, chosen, rejected = self.preference_loss(inputs)
        tokens = (inputs["labels"] != IGNORE_INDEX).sum(-1)
        metrics = preference_metrics(chosen, rejected, tokens, self.args.beta)
        self._means.add("train" if self.model.training else "eval", metrics)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Evaluation needs the loss and the metrics, no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{name}": value for name, value in self._means.take("eval").items()})
        return output

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Adds the means since the last log to what the training loop logs."""
        if "loss" in logs:
            logs.update(self._means.take("train"))
        super().log(logs, *args, **kwargs)
