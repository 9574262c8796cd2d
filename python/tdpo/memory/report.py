"""What `tdpo memory` says, as data and as text."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..config import TDPOConfig
from ..options import MemoryOptions, ModelOptions, require
from .sizes import bytes_of, text_of
from .training import WAYS, Batch, Device, Training

_TITLES = ("tdpo", "published", "TRL's DPO")
_WIDTH = 46  # of what stands before a number


@dataclass(frozen=True)
class Report:
    """Bytes of a training step. A dict has an entry for each of `training.WAYS`; None is what is not known.

    Attributes:
        batch: what it is for.
        plan: of the loss, and why.
        loss: logits, temporaries and gradients that the loss returns.
        together: all of it at its peak.
        longest: the most response tokens of such a batch within `gpu_memory`.
        notes: what is left out, in sentences.
    """

    model: str
    parameters: int
    trained: int
    batch: Batch
    weights: int
    gradients: int
    optimizer: int | None
    optimizer_name: str
    reference: int
    reference_form: str
    copies: int
    activations: int | None
    activations_checkpointed: int | None
    checkpointed: bool
    plan: str
    loss: dict[str, int]
    together: dict[str, int]
    gpu_memory: int | None
    longest: dict[str, int] | None
    notes: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        batch, shared = self.batch, "once a pair" if self.batch.shared else "with each response"
        lines = [
            f"{self.model}: {self.parameters:,} parameters, of which {self.trained:,} train",
            f"{batch.pairs} pairs a batch, prompts of {batch.prompt:,} tokens, {shared}; responses of "
            f"{batch.response:,}",
            "",
            _line("weights", self.weights),
            _line("gradients", self.gradients),
            _line(f"optimizer states ({self.optimizer_name})", self.optimizer),
            _line(f"reference: {self.reference_form}", self.reference),
            _line("weights as autocast computes with them", self.copies),
            _line(f"activations, {'' if self.checkpointed else 'not '}recomputed (rough)", self._activations(True)),
            _line(f"  (if they were {'not ' if self.checkpointed else ''}recomputed)", self._activations(False)),
            "",
            f"{'':{_WIDTH}}" + "".join(f"{title:>12}" for title in _TITLES),
            _line("loss: logits, temporaries, its gradients", *self.loss.values()),
            _line("together, at the peak of a step", *self.together.values()),
        ]
        if self.longest is not None:
            cells = "".join(f"{length:>12,}" for length in self.longest.values())
            lines.append(f"{f'longest responses within {text_of(self.gpu_memory or 0)}, tokens':<{_WIDTH}}{cells}")
        return "\n".join([*lines, "", f"plan of the loss: {self.plan}", *self.notes])

    def _activations(self, as_set: bool) -> int | None:
        return self.activations_checkpointed if self.checkpointed == as_set else self.activations


def _line(what: str, *sizes: int | None) -> str:
    return f"{what:<{_WIDTH}}" + "".join(f"{'?' if size is None else text_of(size):>12}" for size in sizes)


def report_of(models: ModelOptions, data: MemoryOptions, args: TDPOConfig) -> Report:
    """The report for the options of `tdpo memory`.

    Raises:
        ValueError: an option is out of range, or a model is not known; the message names it.
    """
    memory = None if data.gpu_memory is None else bytes_of("gpu_memory", data.gpu_memory)
    batch, device = batch_of(data, args), Device.of(memory)
    training = Training.of(models, args, device)
    longest = None
    if device.memory is not None and not isinstance(training.activations, str):
        longest = {way: training.longest(batch, device.memory, way) for way in WAYS}
    return Report(
        model=require(models, "model"),
        parameters=training.parameters,
        trained=training.trained,
        batch=batch,
        weights=training.weights,
        gradients=training.gradients,
        optimizer=training.optimizer,
        optimizer_name=_optimizer_name(args),
        reference=training.reference.bytes,
        reference_form=training.reference.form,
        copies=training.copies,
        activations=training.kept(batch, checkpointed=False),
        activations_checkpointed=training.kept(batch, checkpointed=True),
        checkpointed=training.checkpointed,
        plan=str(training.estimate(batch).plan),
        loss={way: loss.peak for way, loss in training.loss(batch).items()},
        together=training.together(batch),
        gpu_memory=device.memory,
        longest=longest,
        notes=tuple(_notes(training, models, args)),
    )


def batch_of(data: MemoryOptions, args: TDPOConfig) -> Batch:
    """The batch that the options describe: by default the longest that `max_length` lets through.

    Raises:
        ValueError: prompts or responses are longer than what they are cut to.
    """
    prompt = args.max_prompt_length if data.prompt_tokens is None else data.prompt_tokens
    if prompt > args.max_prompt_length:
        raise ValueError(f"prompt_tokens is {prompt}, but max_prompt_length is {args.max_prompt_length}: raise it too")
    response = args.max_length - prompt if data.response_tokens is None else data.response_tokens
    if prompt + response > args.max_length:
        raise ValueError(
            f"response_tokens is {response}, but max_length is {args.max_length} and prompts have {prompt} tokens: "
            "raise it too"
        )
    return Batch(args.per_device_train_batch_size, prompt, response, args.shared_prompts == "always")


def _optimizer_name(args: TDPOConfig) -> str:
    return str(getattr(args.optim, "value", args.optim))


def _notes(training: Training, models: ModelOptions, args: TDPOConfig) -> list[str]:
    notes = ["Not counted: the process itself, a GPU's context, and what an allocator holds beyond what is in use."]
    if args.fsdp or args.deepspeed or models.tp_plan is not None:
        notes.append("Not counted: sharding. These are the bytes of one process that holds every model whole.")
    if args.audit != "never":
        notes.append("Not counted: the audit before the first step.")
    if args.shared_prompts == "auto":
        notes.append("shared_prompts is auto, which a check on the loaded models decides: prompts are counted twice.")
    if training.optimizer is None:
        notes.append(f"Not counted: the states of {_optimizer_name(args)}, which can't be made without weights.")
    if isinstance(training.activations, str):
        notes.append(f"Not counted: activations, and no longest responses are sought: {training.activations}.")
    return notes
