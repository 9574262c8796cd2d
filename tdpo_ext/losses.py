"""Pairwise preference losses on per-sequence sums: ordinary differentiable torch code on (B,) tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType

import torch.nn.functional as F
from torch import Tensor

from . import checks
from .divergence import TokenDivergence, TokenRows
from .plain_checks import check_beta as check_beta
from .plain_checks import check_label_smoothing as check_label_smoothing
from .plain_checks import check_tdpo_options as check_tdpo_options

Objective = Callable[..., Tensor]
"""objective(chosen, rejected) -> (pairs,): a loss per pair, each pair treated alone. Both sides are TokenDivergence of
per-sequence sums or, where the objective is decorated with `per_token`, TokenRows."""


def _check_sides(chosen: TokenDivergence, rejected: TokenDivergence) -> None:
    """Raises TypeError or ValueError unless both are sums of as many sequences."""
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(side, TokenDivergence):
            raise TypeError(f"{name} is {checks.describe(side)}; a TokenDivergence is needed")
        checks.tensor(f"{name}.logps", side.logps)
    if chosen.logps.shape != rejected.logps.shape:
        raise ValueError(f"rejected has shape {tuple(rejected.logps.shape)} but chosen has {tuple(chosen.logps.shape)}")


@dataclass(frozen=True, eq=False)  # torch.compile of torch 2.11 hashes objects that have no attributes yet
class MarginLoss:
    """An objective link(margin(chosen, rejected)) whose margin is linear: pairs of any length need no recompute.

    The gradient of every token of a pair is then the pair's scalar link'(margin) times a gradient with coefficients
    that are known before the pair has been seen to its end. DPO, TDPO1, TDPO2, IPO and hinge losses are of this form:

        ipo = MarginLoss(lambda chosen, rejected: chosen.logratio - rejected.logratio, lambda m: (m - 5.0) ** 2)

    Attributes:
        margin: margin(chosen, rejected) -> (pairs,), linear in `logps` and `kl` up to detached terms; its coefficients
            may depend on `tokens` and, decorated with `per_token`, on columns and lengths, and on nothing else.
        link: (pairs,) -> (pairs,), any differentiable function of each pair's margin.

    Raises (where it is used):
        ValueError: the margin is not linear. Such an objective can be passed as an ordinary function instead.
    """

    margin: Objective
    link: Callable[[Tensor], Tensor]

    def __post_init__(self) -> None:
        checks.function("margin", self.margin)
        checks.function("link", self.link)

    def __call__(self, *sides: TokenDivergence | TokenRows) -> Tensor:
        return self.link(self.margin(*sides))


def per_token(objective: Objective) -> Objective:
    """Decorator of an objective (or a margin) that sees tokens: it gets TokenRows, and still returns a loss per pair.

    @tdpo_ext.per_token
    def weighted_dpo(chosen, rejected):
        w, l = chosen.columns["weight"], rejected.columns["weight"]  # token_columns={"weight": (2B, T)}
        return -logsigmoid(0.1 * (chosen.sum(w * chosen.logratio) - rejected.sum(l * rejected.logratio)))
    """
    return _marked(objective, "sees_tokens")


def reference_free(objective: Objective) -> Objective:
    """Decorator of an objective (or a margin) that reads neither `ref_logps` nor `kl`: no reference is needed.

    The fused losses take None in the place of the reference then, and `tdpo.TDPOTrainer` loads and runs none, unless
    it is given one.
    """
    return _marked(objective, "reference_free")


def sees_tokens(objective: Objective) -> bool:
    """Whether an objective, or what it wraps (a partial, a margin), is decorated with `per_token`."""
    return _is_marked(objective, "sees_tokens")


def is_reference_free(objective: Objective) -> bool:
    """Whether an objective, or what it wraps (a partial, a margin), is decorated with `reference_free`."""
    return _is_marked(objective, "reference_free")


def _marked(objective: Objective, mark: str) -> Objective:
    """Raises TypeError where the objective can't be decorated."""
    checks.function("objective", objective)
    try:
        setattr(objective, mark, True)
    except AttributeError:
        inside = "its margin" if isinstance(objective, MarginLoss) else "a function that calls it"
        raise TypeError(
            f"objective is {checks.describe(objective)}, which can't be decorated; decorate {inside}"
        ) from None
    return objective


def _is_marked(objective: Objective, mark: str) -> bool:
    if getattr(objective, mark, False):
        return True
    if isinstance(objective, functools.partial):
        return _is_marked(objective.func, mark)
    if isinstance(objective, MarginLoss):
        return _is_marked(objective.margin, mark)
    return False


def tdpo_loss(
    chosen: TokenDivergence,  # each (B,)
    rejected: TokenDivergence,  # each (B,)
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    variant: str = "tdpo2",
) -> Tensor:  # (B,)
    """Token-level Direct Preference Optimization, a loss per pair.

    Args:
        chosen, rejected: per-sequence sums (`TokenDivergence.per_sequence`) of the two responses of each pair.
        beta: strength of the KL constraint, > 0.
        alpha: weight of the sequence-KL difference in "tdpo2", >= 0; not used by "tdpo1".
        variant: "tdpo1" (arXiv 2404.11999, eq. 14-15) or "tdpo2" (eq. 16-18), which stops the gradient of the chosen
            response's KL.

    Returns:
        -log sigmoid(beta (u - delta)), with u the difference of log-ratios and delta the (alpha-weighted) difference
        KL_rejected - KL_chosen.

    Raises:
        ValueError: an option out of range, named in the message.
    """
    loss = tdpo_margin_loss(beta=beta, alpha=alpha, variant=variant)
    _check_sides(chosen, rejected)
    return loss(chosen, rejected)


def tdpo_margin_loss(*, beta: float = 0.1, alpha: float = 0.5, variant: str = "tdpo2") -> MarginLoss:
    """`tdpo_loss` with these options, as margin and link."""
    check_tdpo_options(beta, alpha, variant)
    margin = functools.partial(_tdpo_margin, alpha=alpha, variant=variant)
    return MarginLoss(margin, functools.partial(_logistic, beta=beta))


def _tdpo_margin(chosen: TokenDivergence, rejected: TokenDivergence, *, alpha: float, variant: str) -> Tensor:
    logratios = logratio_margin(chosen, rejected)
    if variant == "tdpo1":
        return logratios - (rejected.kl - chosen.kl)
    return logratios - alpha * (rejected.kl - chosen.kl.detach())


def _logistic(margins: Tensor, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    scaled = beta * margins
    if label_smoothing == 0:
        return -F.logsigmoid(scaled)
    return -(1 - label_smoothing) * F.logsigmoid(scaled) - label_smoothing * F.logsigmoid(-scaled)


def dpo_loss(
    chosen: TokenDivergence,  # each (B,)
    rejected: TokenDivergence,  # each (B,)
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:  # (B,)
    """Direct Preference Optimization (arXiv 2305.18290, eq. 7), a loss per pair.

    Args:
        chosen, rejected: per-sequence sums of the two responses of each pair; their `kl` is not used.
        beta: strength of the KL constraint, > 0.
        label_smoothing: probability that a preference is flipped (conservative DPO), in [0, 0.5).

    Raises:
        ValueError: an option out of range, named in the message.
    """
    loss = dpo_margin_loss(beta=beta, label_smoothing=label_smoothing)
    _check_sides(chosen, rejected)
    return loss(chosen, rejected)


def logratio_margin(chosen: TokenDivergence, rejected: TokenDivergence) -> Tensor:
    """The difference of the responses' log-ratios, (pairs,): the margin of DPO and of most losses after it."""
    return chosen.logratio - rejected.logratio


def dpo_margin_loss(*, beta: float = 0.1, label_smoothing: float = 0.0) -> MarginLoss:
    """`dpo_loss` with these options, as margin and link."""
    check_beta(beta)
    check_label_smoothing(label_smoothing)
    return MarginLoss(logratio_margin, functools.partial(_logistic, beta=beta, label_smoothing=label_smoothing))


@dataclass(frozen=True, eq=False)
class _WeightedMargin:
    """A margin of sums in which every token's values are multiplied by its number in the column "weight"."""

    of_sums: Objective
    sees_tokens = True

    def __call__(self, chosen: TokenRows, rejected: TokenRows) -> Tensor:
        return self.of_sums(_weighted_sums(chosen), _weighted_sums(rejected))


def _weighted_sums(side: TokenRows) -> TokenDivergence:
    weight = side.columns["weight"]
    values = (side.logps, side.ref_logps, side.kl, side.entropy, side.correct, side.tokens)
    return TokenDivergence._make(side.sum(weight * value) for value in values)


def weighted_tokens(loss: MarginLoss) -> MarginLoss:
    """The same loss of sums over tokens that count as much as the token column "weight" says."""
    return MarginLoss(_WeightedMargin(loss.margin), loss.link)


_MARGIN_FORMS: dict[Objective, Callable[..., MarginLoss]] = {tdpo_loss: tdpo_margin_loss, dpo_loss: dpo_margin_loss}


def margin_form(objective: Objective) -> MarginLoss | None:
    """The objective as margin and link: a MarginLoss itself, `tdpo_loss`, `dpo_loss`, or a partial of these."""
    if isinstance(objective, MarginLoss):
        return objective
    function, options = objective, {}
    if isinstance(objective, functools.partial) and not objective.args:
        function, options = objective.func, objective.keywords
    form = _MARGIN_FORMS.get(function) if isinstance(function, FunctionType) else None
    return None if form is None else form(**options)


def rewards(sequence: TokenDivergence, *, beta: float) -> Tensor:
    """Implicit rewards beta (logratio + KL), detached, of the shape of `sequence` (arXiv 2404.11999, eq. 11).

    Raises:
        ValueError: beta <= 0.
    """
    check_beta(beta)
    if not isinstance(sequence, TokenDivergence):
        raise TypeError(f"sequence is {checks.describe(sequence)}; a TokenDivergence is needed")
    return (beta * (sequence.logratio + sequence.kl)).detach()
