"""The audit: before the first step, the loss of real pairs is compared with plain arithmetic.

Plain arithmetic is each sequence alone, without padding, packing or shared prompts, through the model's own logits and
a float32 log_softmax. The loss must give the same for every layout of a batch and every form of reference, fused or
from logits, and the reference must not change while the policy trains.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor, nn

from tdpo_ext import TokenDivergence

from .data.collator import sequences_of
from .data.stream import PreferenceStream
from .loss.preference_loss import PreferenceLoss
from .models.noise import evaluation_mode, without_wanted_noise
from .models.parameter_values import ParameterValues
from .models.sharding import use_head_without_its_forward
from .precision import MIXED_PRECISIONS
from .progress import progress_bar
from .reference.cached_states import CachedStates
from .reference.second_model import SecondModel

_PLAIN_BYTES = 2**28  # of float32 logits at a time, of which a few copies exist

# Differences that rounding explains, as AuditReport has them.
_TOLERANCES = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 0.01,
    torch.bfloat16: 0.03,
    torch.float8_e4m3fn: 0.1,
}


class AuditError(RuntimeError):
    """The loss does not give what plain arithmetic gives. Nothing was trained."""


class AuditReport(NamedTuple):
    """What an audit found.

    Attributes:
        pairs: how many were compared.
        logps, kl: the largest difference of log-probabilities and of KLs from plain arithmetic, of a sequence's mean
            over tokens in nats, divided by one more than the mean itself. Without a reference, `kl` is None.
        reference: what was found of the reference.
        seconds: that it took.
    """

    pairs: int
    logps: float
    kl: float | None
    reference: str
    seconds: float

    def __str__(self) -> str:
        kl = "" if self.kl is None else f", KL {self.kl:.0e}"
        return (
            f"audit: {self.pairs} pairs against plain arithmetic: log-probabilities {self.logps:.0e}{kl}; "
            f"{self.reference}; {self.seconds:.1f} s"
        )


class AuditPassed(Exception):
    """Ends a training that was begun for its audit alone."""

    def __init__(self, report: AuditReport) -> None:
        super().__init__(str(report))
        self.report = report


class Audited(NamedTuple):
    """A prompt and a response.

    Attributes:
        ids: (T,), on the model's device.
        learned: (R,), the places of the response tokens that the loss sees and that have a predictor.
    """

    ids: Tensor
    learned: Tensor


def examples_to_audit(dataset: Dataset | PreferenceStream, rows: list[int]) -> list[dict[str, Any]]:
    """The two longest pairs of a batch, from tokenized data; `rows`: the batch's `token_row`.

    Of a stream, whose rows can't be looked up, those of as many pairs at its beginning.
    """
    if isinstance(dataset, PreferenceStream):
        batch = list(islice(dataset, len(rows)))
    else:
        places = np.flatnonzero(np.isin(dataset.with_format("numpy")["token_row"], rows))[: len(rows)]
        batch = [dataset[int(place)] for place in places]
    return sorted(batch, key=lambda example: example["length"])[:-3:-1]


def audited(examples: list[dict[str, Any]], device: torch.device) -> list[Audited]:
    """The sequences of tokenized pairs, in the order of a batch's."""
    return [
        Audited(torch.tensor(sequence.ids, device=device), torch.tensor(sequence.learned, device=device))
        for sequence in sequences_of(examples)
    ]


class _Sums(NamedTuple):
    """Sums over each sequence's response tokens, (sequences,)."""

    logps: Tensor
    ref_logps: Tensor
    kl: Tensor


@dataclass(frozen=True)
class Audit:
    """Compares a training's loss with plain arithmetic.

    Attributes:
        loss: of the training.
        adapted: the policy with its adapters.
        at_start: the policy was not trained yet, and is its own reference.
        disabled_dropout: the model's own dropout was disabled, so that training mode must make no difference.
        shows_bar: of this process.
    """

    loss: PreferenceLoss
    adapted: nn.Module
    at_start: bool
    disabled_dropout: bool
    shows_bar: bool = False

    def run(
        self, wrapper: nn.Module, sequences: list[Audited], batch: dict[str, Any], accelerator: Accelerator
    ) -> AuditReport:
        """Compares, on all processes together. The training's random numbers are left as they are.

        Args:
            wrapper: the policy as an engine has wrapped it, in training mode.
            sequences: the chosen responses of some pairs, then the rejected ones.
            batch: the same pairs, laid out as the training's batches are.

        Raises:
            AuditError: what differs, and by how much.
        """
        began = time.perf_counter()
        use_head_without_its_forward(self.loss.policy.model)
        checks = len(sequences) + (1 if self._reference_is_apart else 2)  # below, each once
        with (
            progress_bar("Auditing", checks, "checks", shown=self.shows_bar, stays=False) as bar,
            _random_numbers_kept(accelerator.device),
            torch.no_grad(),
        ):
            plain = self._plain(wrapper, sequences, accelerator, bar)
            with without_wanted_noise(self.adapted, disabled_dropout=self.disabled_dropout):
                ours = self._of_loss(wrapper, batch)
            bar.update()
            if self.loss.reference is None:
                ours = ours._replace(ref_logps=plain.ref_logps, kl=plain.kl)  # not to be compared: there are none
            elif self._reference_is_gone:
                plain = plain._replace(ref_logps=ours.ref_logps, kl=ours.kl)
            moved = ours
            if not self._reference_is_apart:
                moved = self._of_loss_with_other_parameters(wrapper, batch)
                bar.update()
        lengths = torch.tensor([len(sequence.learned) for sequence in sequences], device=plain.logps.device)
        differences = [_difference(*pair, lengths) for pair in (*zip(ours, plain), (moved.ref_logps, ours.ref_logps))]
        table = accelerator.gather(torch.tensor([*differences, time.perf_counter() - began], device=lengths.device))
        *found, seconds = table.view(-1, len(differences) + 1).max(0).values.tolist()
        self._judge(found, accelerator)
        kl = None if self.loss.reference is None else found[2]
        return AuditReport(len(sequences) // 2, max(found[:2]), kl, self._about_reference(), seconds)

    def _judge(self, found: list[float], accelerator: Accelerator) -> None:
        allowed = max(_TOLERANCES[dtype] for dtype in self._dtypes(accelerator))
        said = (
            "the policy's log-probabilities",
            "the log-probabilities of the reference, which should be the policy as it starts,"
            if self.at_start
            else "the reference's log-probabilities",
            "the KL",
            "the reference's log-probabilities after a change of what trains",
        )
        wrong = [f"{name} differ by {value:.2g}" for name, value in zip(said, found) if not value <= allowed]
        if wrong:
            raise AuditError(
                f"the audit failed, nothing was trained: against plain arithmetic {'; '.join(wrong)} nats a token "
                f"({allowed:g} is allowed). Numbers of a training would be as wrong. Please report it with the model's "
                "configuration; `audit: never` trains all the same"
            )

    def _dtypes(self, accelerator: Accelerator) -> set[torch.dtype]:
        """The precisions that the models and the plain arithmetic compute in, and that a cache stores."""
        models = [self.loss.policy, *([] if self.loss.reference is None else [self.loss.reference])]
        dtypes = {parameter.dtype for causal_lm in models for parameter in causal_lm.model.parameters()}
        dtypes |= {torch.float32, MIXED_PRECISIONS.get(accelerator.mixed_precision, torch.float32)}
        if isinstance(self.loss.reference, CachedStates):
            dtypes |= {cache.dtype for _, cache in self.loss.reference.caches}
        return dtypes & _TOLERANCES.keys()

    @property
    def _reference_is_apart(self) -> bool:
        """It shares no weights with the policy; or there is none."""
        return self.loss.reference is None or isinstance(self.loss.reference, (SecondModel, CachedStates))

    @property
    def _reference_is_gone(self) -> bool:
        """Its cached states are all that is left, so that there is nothing to compare them with."""
        return isinstance(self.loss.reference, CachedStates) and not self.at_start

    def _about_reference(self) -> str:
        if self.loss.reference is None:
            return "there is no reference"
        if self.at_start:
            return "the reference is the policy"
        if self._reference_is_gone:
            return "the cached reference, whose model is not here, was not compared"
        return "the reference too"

    # ---- the loss ----

    def _of_loss(self, wrapper: nn.Module, batch: dict[str, Any]) -> _Sums:
        output = self.loss.run(wrapper, batch)
        both = TokenDivergence(*map(torch.cat, zip(output.chosen, output.rejected)))
        return _Sums(both.logps, both.ref_logps, both.kl)

    def _of_loss_with_other_parameters(self, wrapper: nn.Module, batch: dict[str, Any]) -> _Sums:
        others = ParameterValues(self.adapted)
        for value in others.values.values():  # enough to show in a reference that depends on them
            value.mul_(1.25).add_(0.01)
        with others.in_place():
            return self._of_loss(wrapper, batch)

    # ---- plain arithmetic ----

    def _plain(self, wrapper: nn.Module, sequences: list[Audited], accelerator: Accelerator, bar: Any) -> _Sums:
        """The sums of all sequences. All processes call the models equally often: an engine's passes are collective."""
        size = max(len(sequence.learned) for sequence in sequences) * self.loss.policy.vocab_size * 4
        chunks = accelerator.gather(torch.tensor([math.ceil(size / _PLAIN_BYTES)], device=accelerator.device)).max()
        sums = []
        for sequence in sequences:
            sums.append(self._plain_sums(wrapper, sequence, int(chunks)))
            bar.update()
        return _Sums(*map(torch.stack, zip(*sums)))

    def _plain_sums(self, wrapper: nn.Module, sequence: Audited, chunks: int) -> tuple[Tensor, ...]:
        sums = torch.zeros(3, dtype=torch.float64, device=sequence.ids.device)
        for chunk in sequence.learned.tensor_split(chunks):
            # All processes call the models, whatever is left for them.
            some = chunk if len(chunk) else sequence.learned[:1]
            logps, ref_logps = self._plain_logps(wrapper, sequence.ids, some - 1)
            p, q = (ref_logps, logps) if self.loss.kl_direction == "forward" else (logps, ref_logps)
            kl = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
            targets = sequence.ids[some][:, None]
            values = torch.stack([logps.gather(1, targets)[:, 0], ref_logps.gather(1, targets)[:, 0], kl])
            sums += values[:, : len(chunk)].sum(1, dtype=torch.float64)
        return tuple(sums)

    def _plain_logps(self, wrapper: nn.Module, ids: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of policy and reference, the log-probabilities that some tokens of a sequence predict, (rows, V), float32."""
        policy = self.loss.policy.model
        with evaluation_mode(policy):
            logps = wrapper(preference=lambda: _log_softmax(policy, ids, rows))
        if self.loss.reference is None or self.at_start or self._reference_is_gone:
            return logps, logps
        return logps, self.loss.reference.call(wrapper, lambda model: _log_softmax(model, ids, rows))


@contextmanager
def state_kept(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A context that leaves random numbers and every module's mode as it found them."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with _random_numbers_kept(device):
            yield
    finally:
        for module, training in modes:
            module.training = training


def _random_numbers_kept(device: torch.device) -> AbstractContextManager[None]:
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device.index or 0], device_type=device.type)


def _log_softmax(model: Any, ids: Tensor, rows: Tensor) -> Tensor:
    """The log-probabilities that some tokens of a sequence predict, run alone, (rows, V), float32."""
    forward = vars(model).get("_plain_forward", model)  # the patched forward is running already
    if "logits_to_keep" in inspect.signature(type(model).forward).parameters:
        logits = forward(input_ids=ids[None], use_cache=False, logits_to_keep=rows).logits[0]
    else:
        logits = forward(input_ids=ids[None], use_cache=False).logits[0][rows]
    return torch.log_softmax(logits.float(), -1)


def _difference(ours: Tensor, plain: Tensor, lengths: Tensor) -> float:
    """The largest difference of a sequence's mean over tokens, divided by one more than the mean itself."""
    lengths = lengths.clamp(min=1)
    difference = ((ours - plain).abs() / lengths / (1 + plain.abs() / lengths)).max()
    return difference.nan_to_num(nan=math.inf).item()
