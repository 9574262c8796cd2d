"""The losses of TRL's DPOConfig that are functions of a pair alone, as TRL 1.16 defines them, for `tdpo.trl`."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from trl import DPOConfig

from tdpo_ext import MarginLoss, TokenDivergence, checks
from tdpo_ext.losses import Objective, check_label_smoothing, logratio_margin

from ..loss.objectives import OBJECTIVES, ipo, mean_logratio_margin, weighted_sum
from ..option_checks import check_objective_options
from ..options import ObjectiveOptions

VARIANTS = ("tdpo2", "tdpo1", "dpo")  # of the loss that takes the place of "sigmoid"
_COUPLED = {
    "aot": "it sorts the log-ratios of a batch",
    "aot_unpaired": "it sorts the log-ratios of a batch",
    "sft": "its mean is over the tokens of a batch",
}
# Options of some losses, and the values that leave them unused.
_OPTIONS_OF = {
    "label_smoothing": (0.0, ("robust", "exo_pair")),
    "discopop_tau": (0.05, ("discopop",)),
}


def loss_types(args: DPOConfig) -> list[str]:
    """The losses of `args` by name."""
    return [args.loss_type] if isinstance(args.loss_type, str) else list(args.loss_type)


def trl_objective(args: DPOConfig, *, alpha: float | None = None, variant: str | None = None) -> Objective:
    """The loss of `args`, its "sigmoid" replaced by the loss `variant` (default: tdpo2) with `alpha` (default: 0.5).

    Raises:
        TypeError, ValueError: a loss that couples pairs or is unknown, or an option out of range or without use; the
            message names it.
    """
    types = loss_types(args)
    for name, value in {"variant": variant, "alpha": alpha}.items():
        if value is not None and "sigmoid" not in types:
            raise ValueError(f"{name} is {value!r}, of the loss in the place of 'sigmoid', but loss_type is {types!r}")
    variant = VARIANTS[0] if variant is None else variant
    checks.choice("variant", variant, VARIANTS)
    options = ObjectiveOptions(variant=variant, beta=args.beta)
    if alpha is not None:
        options.alpha = alpha
    check_objective_options(options)
    weights = [1.0] * len(types) if args.loss_weights is None else list(args.loss_weights)
    if len(weights) != len(types):
        raise ValueError(f"loss_weights is {weights!r}; as many as in loss_type, {types!r}, are needed")
    for weight in weights:
        checks.real("loss_weights", weight)
    for name, (unused, losses) in _OPTIONS_OF.items():
        if getattr(args, name) != unused and not set(losses) & set(types):
            raise ValueError(f"{name} is {getattr(args, name)!r}, but only {' and '.join(losses)} use it")
    check_label_smoothing(args.label_smoothing)
    objectives = [_objective(name, args, OBJECTIVES[variant].build(options)) for name in types]
    return objectives[0] if weights == [1.0] else weighted_sum(list(zip(weights, objectives)))


def _objective(name: str, args: DPOConfig, sigmoid: Objective) -> Objective:
    if name == "sigmoid":
        return sigmoid
    if name in _COUPLED:
        raise ValueError(f"loss_type {name!r} couples pairs: {_COUPLED[name]}; a loss computed in chunks cannot")
    if name not in _LOSSES:
        raise ValueError(f"loss_type is {name!r}; allowed are {', '.join(['sigmoid', *_LOSSES])}")
    return _LOSSES[name](args)


def _robust(args: DPOConfig) -> Objective:
    """Robust DPO (arXiv 2403.00409)."""
    beta, eps = args.beta, args.label_smoothing

    def link(margins: Tensor) -> Tensor:
        clean, flipped = -F.logsigmoid(beta * margins), -F.logsigmoid(-beta * margins)
        return ((1 - eps) * clean - eps * flipped) / (1 - 2 * eps)

    return MarginLoss(logratio_margin, link)


def _exo_pair(args: DPOConfig) -> Objective:
    """EXO (arXiv 2402.00856, eq. 16)."""
    beta, eps = args.beta, args.label_smoothing
    if eps == 0:
        raise ValueError("label_smoothing is 0; it must be positive for the loss 'exo_pair'")

    def link(margins: Tensor) -> Tensor:
        win, lose = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
        return win.exp() * (win - math.log1p(-eps)) + lose.exp() * (lose - math.log(eps))

    return MarginLoss(logratio_margin, link)


def _discopop(args: DPOConfig) -> Objective:
    """DiscoPOP (arXiv 2406.08414, eq. 5)."""

    def link(margins: Tensor) -> Tensor:
        scaled = args.beta * margins
        exponential = torch.sigmoid(scaled / args.discopop_tau)
        return -F.logsigmoid(scaled) * (1 - exponential) + torch.exp(-scaled) * exponential

    return MarginLoss(logratio_margin, link)


def _of_both(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[DPOConfig], Objective]:
    """A loss of the two responses' scaled log-ratios, beta logratio, which no margin sums up."""

    def make(args: DPOConfig) -> Objective:
        def objective(chosen: TokenDivergence, rejected: TokenDivergence) -> Tensor:
            return loss(args.beta * chosen.logratio, args.beta * rejected.logratio)

        return objective

    return make


def _sppo_hard(args: DPOConfig) -> Objective:
    """SPPO with hard probabilities (arXiv 2405.00675, eq. 4.7)."""

    def objective(chosen: TokenDivergence, rejected: TokenDivergence) -> Tensor:
        return (chosen.logratio - 0.5 / args.beta) ** 2 + (rejected.logratio + 0.5 / args.beta) ** 2

    return objective


_LOSSES: dict[str, Callable[[DPOConfig], Objective]] = {
    "hinge": lambda args: MarginLoss(logratio_margin, lambda margins: torch.relu(1 - args.beta * margins)),
    "ipo": lambda args: ipo(args.beta),
    "sigmoid_norm": lambda args: MarginLoss(mean_logratio_margin, lambda margins: -F.logsigmoid(args.beta * margins)),
    "robust": _robust,
    "exo_pair": _exo_pair,
    "discopop": _discopop,
    "sppo_hard": _sppo_hard,
    # NCA (arXiv 2402.05369), BCO without its running mean as TRL has it, and APO (arXiv 2408.06266, eq. 7 and 8).
    "nca_pair": _of_both(lambda w, l: -F.logsigmoid(w) - 0.5 * F.logsigmoid(-w) - 0.5 * F.logsigmoid(-l)),
    "bco_pair": _of_both(lambda w, l: -F.logsigmoid(w) - F.logsigmoid(-l)),
    "apo_zero": _of_both(lambda w, l: 1 - torch.sigmoid(w) + torch.sigmoid(l)),
    "apo_down": _of_both(lambda w, l: torch.sigmoid(w) + 1 - torch.sigmoid(w - l)),
}
