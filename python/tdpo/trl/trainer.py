"""TRL's DPOTrainer with the TDPO losses, on the fused kernels.

    from tdpo.trl import TDPOTrainer
    TDPOTrainer(model, args=DPOConfig(...), alpha=0.5, variant="tdpo2", train_dataset=..., processing_class=...).train()

Data, collation, configuration, logging and the reference are TRL's; `beta` is that of its DPOConfig. Every option of
DPOConfig does what TRL says, or is refused by name (docs/options.md). `rewards/*`, `logps/*`, `entropy`,
`num_tokens` and `mean_token_accuracy` mean what they mean in TRL; `logits/*` are not logged (see `tdpo.loss.metrics`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ProcessorMixin
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import create_model_from_path, use_adapter

from tdpo_ext import checks
from tdpo_ext.divergence import KL_DIRECTIONS

from ..audit import Audit, Audited
from ..data.collator import predicted_responses
from ..loss.metrics import MetricMeans, preference_metrics
from ..loss.preference_loss import FusedLoss, why_not_fused
from ..models.adapters import frozen_parts_kept
from ..models.causal_lm import CausalLM
from ..models.checks import check_model, check_models, check_policy
from ..models.forward import patch_forward
from ..models.noise import evaluation_mode
from ..models.probes import depends_on_the_batch
from ..models.routers import router_coefficient
from ..models.sharding import is_sharded, will_be_spread
from ..models.sizes import check_token_ids, embedded_ids
from ..policy import check_needs_no_logits
from ..precision import WarnOfCoarseWeights, autocast
from ..reference.choose import policy_at_start
from ..reference.reference import Reference
from ..reference.second_model import SecondModel, ShardedModel
from ..refusals import OF_TRL, refuse, refuse_for_device, use_one_gpu
from ..runs.adapters import WholeAdapters
from ..runs.model_card import CITATION
from .losses import VARIANTS, loss_types, trl_objective

_TITLE = "Token-level Direct Preference Optimization"


class TDPOTrainer(WholeAdapters, DPOTrainer):
    """TRL's DPOTrainer, the loss "sigmoid" of its `loss_type` replaced by TDPO's: `tdpo.trl.TDPOTrainer`.

    `tdpo.TDPOTrainer` is another class, which needs no TRL.

    Args:
        model, ref_model: loaded, or the name of a folder or of a hub's model.
        alpha, variant: as in `tdpo_ext.tdpo_loss` (default: 0.5, "tdpo2"); the variant "dpo" is `tdpo_ext.dpo_loss`,
            and so TRL's own. Model cards name what was trained.
        kl_direction: "forward", of the reference from the policy, or "reverse": the KL of the loss and of `kl/*`.
        logits_budget: bytes that logits and other temporaries of the loss may take.
        audit: "first" compares the loss of two pairs with plain arithmetic before the first step (see `tdpo.audit`),
            "never" does not.
        others: DPOTrainer's.

    Raises:
        ValueError: an option of DPOConfig that is not supported, a loss that couples pairs, a bad argument,
            `compute_metrics` (no logits are formed), or a model whose head can't be fused.
        TypeError: `args` that are no DPOConfig, or a processor of images: only text is supported.
    """

    args: DPOConfig
    model: PreTrainedModel
    data_collator: Any

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *positional: Any,
        alpha: float | None = None,
        variant: str | None = None,
        kl_direction: str = "forward",
        logits_budget: int | None = None,
        audit: str = "first",
        **others: Any,
    ) -> None:
        checks.choice("audit", audit, ("first", "never"))
        checks.choice("kl_direction", kl_direction, KL_DIRECTIONS)
        if logits_budget is not None:
            checks.integer("logits_budget", logits_budget, least=1)
        if args is not None:
            if not isinstance(args, DPOConfig):
                raise TypeError(f"args is of {type(args).__name__}; TRL's DPOConfig is needed, or tdpo.TDPOTrainer")
            refuse(args, OF_TRL)
            refuse_for_device(args)
            use_one_gpu(args, model)
            trl_objective(args, alpha=alpha, variant=variant)  # bad options are refused before models are loaded
        check_needs_no_logits(others)
        if variant != "dpo" and (args is None or "sigmoid" in loss_types(args)):
            self._name, self._tag_names = (variant or VARIANTS[0]).upper(), ["trl", "tdpo"]
            self._paper = {"title": _TITLE, "id": "2404.11999", "citation": CITATION}
        if isinstance(others.get("processing_class"), ProcessorMixin):
            raise TypeError("processing_class is a processor of images; only text is supported: give its tokenizer")
        if isinstance(ref_model, str):
            ref_model = _load_reference(ref_model, model, args)
        tokenizer, loaded = others.get("processing_class"), isinstance(model, nn.Module)
        if (
            loaded and args is not None and tokenizer is not None
        ):  # otherwise TRL makes them, and they are checked below
            with autocast(args):
                check_models(model, ref_model, args, tokenizer, others.get("peft_config"))
        if ref_model is None and "default" not in getattr(model, "peft_config", {"default": None}):
            raise ValueError(
                f"model has adapters called {', '.join(model.peft_config)}, but TRL copies those called 'default' for "
                "its reference: load them without a name (adapter_name), or use tdpo.TDPOTrainer"
            )
        with _plainly_initialised(model):
            super().__init__(model, ref_model, args, *positional, **others)
        use_one_gpu(self.args, self.model)  # of a configuration that TRL has made
        _check_lengths(self.args, self.train_dataset)
        if self._is_vlm:
            raise TypeError("model is a vision model; only text is supported: give processing_class=its tokenizer")
        with autocast(self.args):
            check_model("model", self.model, self.args, self._tokenizer)
            check_policy(self.model, self.ref_model, self._tokenizer, trains=True)
        for dataset in (self.train_dataset, self.eval_dataset):
            check_token_ids(dataset, embedded_ids(model=self.model))
        self.add_callback(WarnOfCoarseWeights())
        with autocast(self.args):
            policy = CausalLM.of(self.model, will_be_spread=will_be_spread(self.args))
            reference = self._reference(policy)
            for name, model_read in {"model": policy, "ref_model": reference}.items():
                problem = depends_on_the_batch(model_read, self.args.max_length)
                if problem is not None:
                    raise ValueError(
                        f"{name} can't be trained in TRL's padded batches: {problem}; use tdpo.TDPOTrainer"
                    )
        reason = why_not_fused(policy, reference)
        if reason is not None:
            raise ValueError(f"the fused loss can't be used: {reason}")
        self._tdpo = FusedLoss(
            policy,
            reference,
            trl_objective(self.args, alpha=alpha, variant=variant),
            router_coefficient=router_coefficient(policy, self.args.router_aux_loss_coef),
            kl_direction=kl_direction,
            logits_budget=logits_budget,
        )
        patch_forward(self.model, self._tdpo)
        self.data_collator = _WithResponseRows(self.data_collator)
        self._audit_due = audit == "first"
        self._reference_is_policy = ref_model is None
        self._means = {mode: MetricMeans(self.accelerator) for mode in ("train", "eval")}
        self._new_tokens = 0

    def _reference(self, policy: CausalLM) -> Reference:
        """TRL's reference, in its form for our loss; where TRL would take adapters out, the policy as it starts."""
        if self.ref_model is None:
            holds_all_that_trains = "ref" in getattr(self.model, "peft_config", {}) and all(
                ".default." in name for name, parameter in self.model.named_parameters() if parameter.requires_grad
            )
            if holds_all_that_trains:
                copied = RefAdapter(**vars(policy), adapted=self.model)
                if copied.equals(policy):
                    return copied
            return policy_at_start(policy, self.model)
        reference = SecondModel.of(self.accelerator.unwrap_model(self.ref_model))
        sharded = is_sharded(reference.model)
        return ShardedModel(**vars(reference), wrapper=self.ref_model) if sharded else reference

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        if self._audit_due:
            self._audit_due = False
            self._audit(model, self._prepare_inputs(inputs))
        return super().training_step(model, inputs, *args, **kwargs)

    def _audit(self, model: nn.Module, batch: dict[str, Any]) -> None:
        """Audits the two longest pairs of a batch."""
        lengths = batch["attention_mask"].sum(1).view(2, -1).sum(0)
        pairs = lengths.argsort(descending=True)[:2]
        rows = torch.cat([pairs, pairs + len(lengths)])
        some = {name: batch[name][rows] for name in ("input_ids", "attention_mask", "completion_mask")}
        sequences = []
        for ids, tokens, response in zip(*(some[name] for name in some)):
            kept = tokens.bool()
            sequences.append(Audited(ids[kept], 1 + response[kept][1:].nonzero()[:, 0]))
        audit = Audit(
            self._tdpo,
            self.model,
            at_start=self._reference_is_policy and self.state.global_step == 0,
            disabled_dropout=self.args.disable_dropout,
        )
        report = audit.run(model, sequences, with_response_rows(some), self.accelerator)
        if self.accelerator.is_main_process:
            print(report, file=sys.stderr)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool) -> Any:
        output = self._tdpo.run(model, inputs)
        self._means[self._mode].add(preference_metrics(output, self.beta))
        if self.model.training:
            self._new_tokens += inputs["num_tokens"]
        return (output.loss, {}) if return_outputs else output.loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the means since the last log, which TRL then logs as its own."""
        means = self._means[self._mode].take()
        if means:
            new, self._new_tokens = self._new_tokens, 0
            counted = self.accelerator.reduce(torch.tensor(new, device=self.accelerator.device), "sum")
            self._total_train_tokens += int(counted) // self._tp_size
            means["num_tokens"] = self._total_train_tokens
        self._metrics[self._mode].update({name: [mean] for name, mean in means.items()})
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._means["eval"] = MetricMeans(self.accelerator)  # a prediction or an interrupted evaluation left entries
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self._compute_loss(model, inputs, return_outputs=False)
        return loss.detach(), None, None


def _check_lengths(args: DPOConfig, dataset: Any) -> None:
    """TRL counts no lengths, and drops columns that its collator does not read."""
    name, columns = args.length_column_name, getattr(dataset, "column_names", None) or []
    if args.train_sampling_strategy in ("group_by_length", "batch_rebalance") and (
        args.remove_unused_columns or name not in columns
    ):
        raise ValueError(
            f"train_sampling_strategy is {args.train_sampling_strategy!r}, for which TRL needs lengths: give "
            f"train_dataset a column {name!r} of numbers and set remove_unused_columns=False, or use tdpo.TDPOTrainer"
        )


def _load_reference(name: str, policy: Any, args: DPOConfig | None) -> nn.Module:
    """The reference `name`, loaded as TRL loads the one it makes itself: like the policy."""
    given = None if args is None else args.model_init_kwargs
    options: dict[str, Any] = dict(given) if isinstance(given, dict) else {}
    options.setdefault("trust_remote_code", bool(args and args.trust_remote_code))
    if not isinstance(policy, str):
        options.setdefault("dtype", policy.dtype)
        options.setdefault("attn_implementation", policy.config._attn_implementation)
    return create_model_from_path(name, **options)


@contextmanager
def _plainly_initialised(model: Any) -> Iterator[None]:
    """A context in which TRL copies adapters: it initialises new ones by their configuration, then overwrites them.

    An initialisation such as PiSSA would move a part of the model's weights into the copy, and all of the adapters that
    are copied would train.
    """
    adapters = getattr(model, "peft_config", {}).values()
    configs = [config for config in adapters if hasattr(config, "init_lora_weights")]
    initialisations = [config.init_lora_weights for config in configs]
    for config in configs:
        config.init_lora_weights = True
    try:
        with frozen_parts_kept(model) if configs else nullcontext():
            yield
    finally:
        for config, initialisation in zip(configs, initialisations):
            config.init_lora_weights = initialisation


@dataclass(frozen=True)
class RefAdapter(Reference):
    """The policy's own model with TRL's adapter "ref", a copy of what trains as it starts."""

    adapted: Any = None

    @contextmanager
    def running(self) -> Iterator[None]:
        with frozen_parts_kept(self.adapted), use_adapter(self.adapted, "ref"):
            yield

    @torch.no_grad()
    def equals(self, policy: CausalLM) -> bool:
        """Whether it gives the policy's logits of two tokens: TRL copies parameters, but no scale that was set."""
        if is_sharded(policy.model):
            return True
        ids = torch.tensor([[1, 2]], device=policy.weight.device) % policy.vocab_size
        with evaluation_mode(policy.model):
            expected = policy.logits(input_ids=ids)
            with self.running():
                return torch.equal(expected, self.logits(input_ids=ids))


@dataclass
class _WithResponseRows:
    """TRL's padded batches with their response rows, found on the host."""

    collate: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        return with_response_rows(self.collate(examples))


def with_response_rows(batch: dict[str, Any]) -> dict[str, Any]:
    """A padded batch of TRL, and beside it what `PreferenceCollator` says of response tokens."""
    input_ids = batch["input_ids"]
    sequences, length = input_ids.shape
    responses = predicted_responses(
        input_ids, batch["completion_mask"].bool(), torch.arange(sequences, device=input_ids.device) * length
    )
    lengths = {"row_lengths": responses["cu_seqlens"].diff().tolist()}
    return {**batch, **responses, **lengths, "num_tokens": int(batch["attention_mask"].sum())}
