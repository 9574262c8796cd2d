"""The objectives that the trainer knows by name, and what each needs.

All are functions of a pair alone, as `tdpo_ext.linear_preference_loss` takes them. Where a loss is a function of a
margin that is linear in the tokens' values, it is a `MarginLoss`: pairs of any length then need no recompute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tdpo_ext import MarginLoss, TokenDivergence, TokenRows, per_token, reference_free
from tdpo_ext.losses import Objective, dpo_margin_loss, tdpo_margin_loss

from ..options import ObjectiveOptions


class NamedObjective(NamedTuple):
    """An objective as the configuration names it.

    Attributes:
        build: the objective with some options.
        formula: the loss of a pair; see docs/objectives.md for the notation.
        source: where it comes from.
        columns: the token columns that the data must have.
        kl_direction: of the KL that it sees.
    """

    build: Callable[[ObjectiveOptions], Objective]
    formula: str
    source: str
    columns: tuple[str, ...] = ()
    kl_direction: str = "forward"


@dataclass(frozen=True)
class TrainedObjective:
    """What a run trains on: the loss, the direction of its KL, and the numbers per token that it reads."""

    objective: Objective
    kl_direction: str
    token_columns: tuple[str, ...]


def mean_logratio_margin(chosen: TokenDivergence, rejected: TokenDivergence) -> Tensor:
    """The difference of the log-ratios' means over tokens, (pairs,)."""
    return chosen.logratio / chosen.tokens.clamp(min=1) - rejected.logratio / rejected.tokens.clamp(min=1)


@reference_free
def mean_logp_margin(chosen: TokenDivergence, rejected: TokenDivergence) -> Tensor:
    """The difference of the log-probabilities' means over tokens, (pairs,)."""
    return chosen.logps / chosen.tokens.clamp(min=1) - rejected.logps / rejected.tokens.clamp(min=1)


def ipo(beta: float) -> MarginLoss:
    """IPO, on means over tokens, as its authors' results and TRL have it."""
    return MarginLoss(mean_logratio_margin, lambda margins: (margins - 1 / (2 * beta)) ** 2)


def tis_dpo(beta: float, alpha: float) -> MarginLoss:
    """TIS-DPO as its authors published it: log-ratios and reverse KLs weighted token by token."""

    @per_token
    def margin(chosen: TokenRows, rejected: TokenRows) -> Tensor:
        w, l = chosen.columns["weight"], rejected.columns["weight"]
        logratios = chosen.sum(w * chosen.logratio) - rejected.sum(l * rejected.logratio)
        return logratios - alpha * (chosen.sum(w * chosen.kl) - rejected.sum(l * rejected.kl))

    return MarginLoss(margin, lambda margins: -F.logsigmoid(beta * margins))


OBJECTIVES = {
    "tdpo2": NamedObjective(
        lambda o: tdpo_margin_loss(beta=o.beta, alpha=o.alpha, variant="tdpo2"),
        formula="-logsigmoid(beta (u - alpha (KL_l - sg KL_w)))",
        source="arXiv 2404.11999, eq. 16-18",
    ),
    "tdpo1": NamedObjective(
        lambda o: tdpo_margin_loss(beta=o.beta, variant="tdpo1"),
        formula="-logsigmoid(beta (u - (KL_l - KL_w)))",
        source="arXiv 2404.11999, eq. 14-15",
    ),
    "dpo": NamedObjective(
        lambda o: dpo_margin_loss(beta=o.beta, label_smoothing=o.label_smoothing),
        formula="-(1 - eps) logsigmoid(beta u) - eps logsigmoid(-beta u)",
        source="arXiv 2305.18290, eq. 7",
    ),
    "ipo": NamedObjective(
        lambda o: ipo(o.beta),
        formula="(mean u - 1 / (2 beta))²",
        source="arXiv 2310.12036, eq. 17",
    ),
    "simpo": NamedObjective(
        lambda o: MarginLoss(mean_logp_margin, lambda margins: -F.logsigmoid(o.beta * margins - o.simpo_gamma)),
        formula="-logsigmoid(beta (mean log p_w - mean log p_l) - gamma)",
        source="arXiv 2405.14734, eq. 6",
    ),
    "tis_dpo": NamedObjective(
        lambda o: tis_dpo(o.beta, o.alpha),
        formula="-logsigmoid(beta (sum w_w logratio_w - sum w_l logratio_l - alpha (sum w_w kl_w - sum w_l kl_l)))",
        source="arXiv 2410.04350",
        columns=("weight",),
        kl_direction="reverse",
    ),
}


def weighted_sum(objectives: Sequence[tuple[float, Objective]]) -> Objective:
    """The sum of objectives, each times its weight; a MarginLoss where all are, of one margin."""
    losses = [objective for _, objective in objectives if isinstance(objective, MarginLoss)]
    if len(losses) == len(objectives) and len({id(loss.margin) for loss in losses}) == 1:
        links = [(weight, loss.link) for (weight, _), loss in zip(objectives, losses)]
        return MarginLoss(losses[0].margin, lambda m: torch.stack([weight * link(m) for weight, link in links]).sum(0))

    def total(chosen: TokenDivergence, rejected: TokenDivergence) -> Tensor:
        return torch.stack([weight * objective(chosen, rejected) for weight, objective in objectives]).sum(0)

    return total
