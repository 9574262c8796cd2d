"""From the arguments of a public loss to its value and its sums: checks, a plan, and the loop that runs it."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from torch import Tensor

from .. import checks
from ..divergence import TokenDivergence
from ..losses import Objective, margin_form
from ..objective_checks import check_objective
from ..vocab_parallel import Fact, digest
from .chunked import chunked_loss
from .heads import CallTensors
from .inputs import check_columns, prepare
from .options import FusedOptions
from .pair_loss import PairLoss
from .planning.choose import make_plan
from .planning.plan import ChunkedPlan
from .rows import Sequences
from .streaming import streamed_loss


def fused_loss(
    function: str,
    objective: Objective,
    tensors: CallTensors,
    *,
    sequences: Sequences,
    token_columns: Mapping[str, Tensor] | None,
    options: FusedOptions,
) -> tuple[Tensor, list[TokenDivergence]]:
    """The mean loss, and sums of each side's sequences, of the public `function`."""
    if token_columns is not None and not isinstance(token_columns, Mapping):
        raise TypeError(f"token_columns is {checks.describe(token_columns)}; tensors by name are needed")
    columns = dict(token_columns or {})

    def check_alone() -> list[Fact]:
        checks.function("objective", objective)
        check_columns(columns, tensors.labels)
        of_columns = 0 if options.shard is None else sum(digest(column) for column in columns.values()) >> 8
        losses = check_objective(
            objective,
            tensors.labels.device,
            list(columns),
            sides=sequences.sides,
            has_reference=tensors.has_reference,
        )
        return [
            Fact("objective", losses, "objective"),
            Fact("columns", of_columns, "token_columns"),
        ]

    inputs, rows, plan_inputs = prepare(tensors, sequences, options, check_alone)
    margin_loss = margin_form(objective)
    plan = make_plan(
        rows.pair_lengths,
        plan_inputs.sizes,
        plan_inputs.budget,
        can_defer=margin_loss is not None,
        can_separate=inputs.wants_hidden_gradient_alone,
        device_type=inputs.device.type,
    )
    flat_columns = {name: column.reshape(-1) for name, column in columns.items()}
    loss = PairLoss(
        function=function, objective=margin_loss or objective, inputs=inputs, rows=rows, columns=flat_columns
    )
    if isinstance(plan, ChunkedPlan):
        return loss.apply(functools.partial(chunked_loss, loss, plan))
    return loss.apply(functools.partial(streamed_loss, loss, plan))
