"""TDPO on transformers.Trainer: its training loop and logging; our loss, reference, metrics and atomic checkpoints."""

from __future__ import annotations

import copy
import functools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import TrainOutput, has_length

from tdpo_ext.losses import Objective

from .audit import Audit, AuditPassed, AuditReport, audited, examples_to_audit, state_kept
from .config import TDPOConfig
from .data.collator import PreferenceCollator
from .data.stream import PreferenceStream
from .data.tokenize import padding_token
from .files import check_manifest
from .loss.identity import objective_name
from .loss.metrics import DatasetMeans, MetricMeans, PairMetric, preference_metrics
from .loss.set_up import set_up_loss
from .models.forward import patch_forward
from .models.noise import configured_dropout
from .models.sizes import embedded_ids
from .option_checks import check_output_dir
from .policy import check_trainer_arguments, learning_rate, prepare_policy
from .precision import WarnOfCoarseWeights, autocast, trained_dtypes
from .progress import shows_bars
from .reference.cached_states import CachedStates
from .reference.digests import digests_at_start
from .reference.second_model import SecondModel
from .runs import checkpoints
from .runs.adapters import WholeAdapters
from .runs.hub import HubUploads
from .runs.inputs import Inputs
from .runs.lock import only_run_in
from .runs.logs import KLWarning, show_readable_logs
from .runs.model_card import model_card
from .runs.record import RunRecord
from .runs.resume import ResumePoint, resume_point
from .runs.samples import refuses_samples, show_samples
from .runs.schedule import ScheduledRates
from .runs.stopping import StopAfterStep
from .tokenization import Tokenization


class TDPOTrainer(WholeAdapters, HubUploads, Inputs, ScheduledRates):
    """Trains a causal language model on preference pairs: `tdpo.TDPOTrainer`, on transformers' Trainer.

    `tdpo.trl.TDPOTrainer` is another class, a subclass of TRL's DPOTrainer.

    Args:
        model: the policy, an AutoModelForCausalLM or a peft model.
        ref_model: the frozen reference. None takes the policy as it is now (docs/reliability.md says in what form), or
            none at all where the objective needs none (`simpo`; your own, decorated with `tdpo_ext.reference_free`).
        args: options; a copy is kept, so that they can serve another trainer.
        train_dataset, eval_dataset: preference rows (`tdpo.data.rows`) or streams of them; eval_dataset may be a dict.
        processing_class: the tokenizer.
        peft_config: adapters to train instead of the whole policy, such as `peft.LoraConfig`.
        objective: a loss of your own, as `tdpo_ext.linear_preference_loss` takes it (docs/objectives.md), instead of
            the `variant` of `args`, whose `beta` then scales `rewards/*` alone; its other options must be unset.
        others: as in `transformers.Trainer`.

    Raises:
        ValueError: bad data or tokenizer (see `tokenize_preferences`), a reference with another vocabulary, a stale or
            corrupt reference cache, or a model that needs padding.
        FloatingPointError: while training, a loss that isn't finite; the message names the rows of the batch.
    """

    args: TDPOConfig
    model: PreTrainedModel
    train_dataset: Dataset | PreferenceStream | None
    eval_dataset: Dataset | PreferenceStream | dict[str, Dataset | PreferenceStream] | None
    processing_class: PreTrainedTokenizerBase
    data_collator: Any
    data_name: str | None = None  # how the model card names the training data
    was_finished = False  # the last call of `train` found the run finished
    _staging: str | None = None  # the folder of a checkpoint that is being written
    _audit_due = False  # before the next step
    _audit_alone = False  # and the training ends with it
    _trained = False  # a step was taken since construction

    def __init__(
        self,
        model: nn.Module,
        ref_model: nn.Module | None = None,
        args: TDPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: Any = None,
        objective: Objective | None = None,
        **others: Any,
    ) -> None:
        args = TDPOConfig(output_dir="out") if args is None else copy.copy(args)
        tokenizer = check_trainer_arguments(
            model, ref_model, args, processing_class, peft_config, data=(train_dataset, eval_dataset), others=others
        )
        trained = args.trained_objective(objective)
        embedded = embedded_ids(model=model, ref_model=ref_model)
        self._tokenize = Tokenization(tokenizer, args, embedded, trained.token_columns)
        train_dataset = self._tokenize("train_dataset", train_dataset, trains=True)
        eval_dataset = self._tokenize("eval_dataset", eval_dataset)
        collator = PreferenceCollator(
            padding_token(tokenizer), padding_free=args.padding_free, token_columns=trained.token_columns
        )
        self._weights = digests_at_start(model, ref_model)
        policy = prepare_policy(model, ref_model, args, tokenizer, peft_config)
        args.learning_rate = learning_rate(args, policy)
        super().__init__(
            model=policy,
            args=args,
            data_collator=others.pop("data_collator", None) or collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            **others,
        )
        # The loss is a mean over pairs: gradient accumulation divides it, nothing is normalised by tokens.
        self.model_accepts_loss_kwargs = False
        show_readable_logs(self)
        self._stop = StopAfterStep(self.accelerator, saves=args.save_strategy != "no")
        for callback in (self._stop, WarnOfCoarseWeights()):
            self.add_callback(callback)
        self._kl_warning = KLWarning(args.kl_warning, args.learning_rate)
        self._training_means = MetricMeans(self.accelerator)
        self._evaluation_means = DatasetMeans(self.accelerator)
        self._own_objective = None if objective is None else objective_name(objective)
        self._trained_dtypes = trained_dtypes(self.model)
        with autocast(args):
            self.loss, self.data_collator = set_up_loss(
                model=self.model,
                ref_model=ref_model,
                args=args,
                trained=trained,
                collator=self.data_collator,
                datasets=(self.train_dataset, self.eval_dataset),
                pad_token_id=padding_token(tokenizer),
                accelerator=self.accelerator,
            )
        self.reference = self.loss.reference
        self._reference_is_policy = ref_model is None  # as it starts
        self.ref_model = self.reference.model if isinstance(self.reference, SecondModel) else None
        patch_forward(self.model, self.loss)

    # ---- data ----

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> DataLoader:
        """Also of rows; with `precompute_reference`, batches hold the hidden states in the cache of `dataset` too."""
        dataset = self._tokenize.unless_tokenized(dataset)  # given to `evaluate` or `predict`
        collator = self.data_collator
        try:
            self.data_collator = self._collator_of(dataset)
            return super()._get_dataloader(dataset, *args, **kwargs)
        finally:
            self.data_collator = collator

    def _collator_of(self, dataset: Any) -> Any:
        if not isinstance(self.reference, CachedStates):
            return self.data_collator
        return replace(self.data_collator, stored_hidden=self.reference.stored_hidden(dataset))

    # ---- loss and metrics of a batch ----

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch; its metrics are accumulated until the next log."""
        output = self.loss.run(model, inputs)
        metrics = preference_metrics(output, self.args.beta, has_reference=self.reference is not None)
        if self.model.training:
            self._training_means.add(metrics)
            self._new_tokens += inputs["num_tokens"]
        else:
            losses = self.loss.of_pairs(output)
            metrics["loss"] = PairMetric(losses, torch.ones_like(losses))
            self._evaluation_means.add(inputs["token_row"], metrics)
        return (output.loss, {}) if return_outputs else output.loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *arguments: Any, **others: Any) -> Tensor:
        """Adds a batch's gradient. The loss is checked after the backward pass is launched, so that no device idles.

        Raises:
            FloatingPointError: the loss is not finite; the message names the rows of the batch.
        """
        if self._audit_due:
            self._audit(model, inputs["token_row"].tolist())
        loss = super().training_step(model, inputs, *arguments, **others)
        self._trained = True
        self._check_finite(loss, inputs)
        return loss

    def _check_finite(self, loss: Tensor, inputs: dict[str, Any]) -> None:
        checkpoints.check_loss(loss, inputs["dataset_row"], self.state.global_step + 1, self.args.output_dir)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Evaluation needs the loss and the metrics, no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self._check_finite(loss, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Adds the means over the evaluation set to its metrics, and shows samples if `eval_samples` asks for them."""
        self._evaluation_means = DatasetMeans(self.accelerator)  # an interrupted evaluation may have left entries
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix=metric_key_prefix
        )
        means = self._evaluation_means.take()
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        if self.args.eval_samples and not refuses_samples(sharded=self._has_engine()) and self.args.should_save:
            show_samples(
                policy=self.accelerator.unwrap_model(self.model),
                reference=self.reference,
                tokenizer=self.processing_class,
                dataset=dataloader.dataset,
                args=self.args,
                name=f"{metric_key_prefix}-step-{self.state.global_step}",
            )
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, and the tokens so far, to the entries of the training loop.

        It alone passes `start_time`; what a user logs by hand stays as it is. With `include_num_input_tokens_seen`,
        transformers logs its own count in the place of `num_tokens`.
        """
        if "loss" in logs and start_time is not None:
            logs.update(self._training_means.take())
            self._count_tokens()
            if self.args.include_num_input_tokens_seen == "no":
                logs["num_tokens"] = self.state.num_input_tokens_seen
            if self.reference is not None:
                self._kl_warning.check(logs["kl/chosen"], self.state.global_step)
        super().log(logs, start_time)

    # ---- resuming and saving ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Trains; with `resume_from_checkpoint` from that checkpoint, or with True from the newest good one.

        A run that is finished is not trained further: its checkpoint is loaded, and `was_finished` is set. On Ctrl-C
        and SIGTERM the current step ends and a checkpoint is written, unless `save_strategy` is "no".

        Raises:
            ValueError: a file of the checkpoint is damaged, there is no good checkpoint, or it is of a run with other
                options or data and `resume_anyway` is not set; another run trains in output_dir; the message names
                what is wrong.
            stopping.Interrupted, stopping.Terminated: after a signal.
        """
        self.was_finished = False
        given = {"model": self.model, "ref_model": self.ref_model}
        folders = {name: model.config._name_or_path for name, model in given.items() if model is not None}
        check_output_dir(self.args.output_dir, folders)
        with only_run_in(self.args.output_dir), self._stop.listening():
            if resume_from_checkpoint:
                point = resume_point(self.args, self.record, resume_from_checkpoint, self.total_steps())
                if point.finished:
                    return self._finished(point)
                resume_from_checkpoint = point.path
            self._audit_due = self.args.audit == "first"
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def audit(self) -> AuditReport:
        """Compares the loss with plain arithmetic on real pairs, as `train` does before its first step.

        Raises:
            AuditError: they differ; the message says what, and by how much.
            ValueError: there are no pairs.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset is None: an audit needs pairs")
        self._audit_due = self._audit_alone = True
        noise, self.neftune_noise_alpha = self.neftune_noise_alpha, None  # which only the end of a training takes out
        try:
            with state_kept(self.model, self.args.device):
                super().train()
        except AuditPassed as passed:
            return passed.report
        finally:
            self._audit_due = self._audit_alone = False
            self.neftune_noise_alpha = noise
        raise ValueError("train_dataset holds no pairs to audit")

    def _audit(self, model: nn.Module, rows: list[int]) -> None:
        """Audits the two longest pairs of a batch; `rows`: its `token_row`."""
        self._audit_due = False
        assert self.train_dataset is not None
        examples = examples_to_audit(self.train_dataset, rows)
        batch = self._prepare_inputs(self._collator_of(self.train_dataset)(examples))
        audit = Audit(
            self.loss,
            self.model,
            at_start=self._reference_is_policy and not self._trained and self.state.global_step == 0,
            disabled_dropout=self.args.disable_dropout,
            shows_bar=shows_bars(self.args),
        )
        report = audit.run(model, audited(examples, self.args.device), batch, self.accelerator)
        if self._audit_alone:
            raise AuditPassed(report)
        if self.args.should_save:
            print(report, file=sys.stderr)

    def total_steps(self) -> int:
        """The optimizer steps of the whole run."""
        return self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _finished(self, point: ResumePoint) -> TrainOutput:
        if not self._has_engine():  # FSDP and DeepSpeed load only into wrapped models
            self._load_from_checkpoint(point.path)
        self.state, self.was_finished = point.state, True
        return TrainOutput(self.state.global_step, float("nan"), {})

    @functools.cached_property
    def record(self) -> RunRecord:
        """What identifies this run."""
        return RunRecord.of(
            self.args,
            self.accelerator.unwrap_model(self.model),
            self.ref_model,
            self.train_dataset,
            weights=self._weights,
            dtypes=self._trained_dtypes,
            processes=self.accelerator.num_processes,
            objective=self._own_objective,
        )

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        check_manifest(self.state.best_model_checkpoint)
        super()._load_best_model()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model.

        Raises:
            FloatingPointError: its weights are not finite.
        """
        checkpoints.check_finite(self.model, sharded=self._has_engine() or self.get_tp_size() > 1)
        super().save_model(output_dir, _internal_call)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._count_tokens()
        if self.args.save_total_limit is not None:
            self._finish_current_push()  # it may still read a checkpoint that is removed below
        try:
            with checkpoints.atomic_checkpoint(self.args, self.accelerator, self.state) as self._staging:
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    self.record.write(Path(self._staging, f"checkpoint-{self.state.global_step}"))
        finally:
            self._staging = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with configured_dropout(self.model):
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            Path(output_dir or self.args.output_dir, "README.md").write_text(self.card())

    def card(self, **details: Any) -> str:
        """The README of the policy as it is now; `details` as `runs.model_card.model_card` takes them."""
        return model_card(
            self.args,
            self.accelerator.unwrap_model(self.model),
            self.state,
            own_objective=self._own_objective is not None,
            data=self.data_name,
            pairs=len(self.train_dataset) if has_length(self.train_dataset) else None,
            processes=self.accelerator.num_processes,
            **details,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._staging is None and self.is_world_process_zero():  # once it is where it stays
            super()._push_from_checkpoint(checkpoint_folder)
