"""A pair that is too long for the budget, a block of rows at a time ("deferred"): nothing is recomputed.

The gradient of a `MarginLoss` by every row is one number of the pair, link'(margin), times a gradient with coefficients
that are known at once. So a block's dz is formed without that factor. It is kept until the pair is complete, and the
factor is multiplied into the rows of hidden; or, where the pair is too long for that, dhidden and dW are accumulated
unscaled and multiplied then.

Of any other objective, what a frozen head leaves is dhidden = dlogps (W_y - p W) + dkl (p - q) W, row by row (or what
the reverse KL has in its place): both products are kept, in the size of hidden states, until the loss says dlogps and
dkl.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..divergence import TokenDivergence
from ..ops import operators
from .blocks import slices
from .gradients import DeferredGradients, HiddenGradient
from .objective_gradient import Coefficients, Upstream
from .rows import Chunk
from .run import Run


def long_pair(run: Run, pair: Chunk) -> Upstream:
    """One pair, a block of rows at a time: adds its gradients where any are wanted."""
    columns = run.columns_of(pair)
    if not run.wanted.any:
        values = torch.cat([run.forward(rows).values for rows in _blocks(run, pair)], dim=1)
        return run.exchange.run(
            lambda: run.objective.upstream(values, pair, columns), lambda: run.objective.nothing(values, pair)
        )
    if run.plan.separates:
        return _separate_long_pair(run, pair, columns)
    placeholders = _placeholder_values(run, pair)
    coefficients = run.exchange.run(
        lambda: run.objective.coefficients(placeholders, pair, columns),
        lambda: Coefficients(placeholders[0], placeholders[0]),
    )
    keep_until_complete = _keep_long_pair if pair.count <= run.plan.dz_rows else _sum_long_pair
    return keep_until_complete(run, pair, columns, coefficients)


def _keep_long_pair(run: Run, pair: Chunk, columns: Mapping[str, Tensor], coefficients: Coefficients) -> Upstream:
    """Keeps the dz of all rows of a pair; its factor joins them in the products for the gradients."""
    run.make_room(pair.count)
    first_kept = len(run.kept)
    values = [_keep_block(run, rows, pair, coefficients) for rows in _blocks(run, pair)]
    upstream, factor = _completed(run, pair, torch.cat(values, dim=1), columns, coefficients)
    for kept in run.kept[first_kept:]:
        kept.factor = factor
    return upstream


def _sum_long_pair(run: Run, pair: Chunk, columns: Mapping[str, Tensor], coefficients: Coefficients) -> Upstream:
    """Accumulates the gradients of a pair block by block without its factor, which then multiplies the sums."""
    run.flush()
    gradients = DeferredGradients(run.gradients, run.inputs, pair.rows, run.buffers.pair_weights)
    values = []
    for rows in _blocks(run, pair):
        run.make_room(rows.stop - rows.start, gradients)
        values.append(_keep_block(run, rows, pair, coefficients))
    run.flush(gradients)
    upstream, factor = _completed(run, pair, torch.cat(values, dim=1), columns, coefficients)
    gradients.commit(factor)
    return upstream


def _separate_long_pair(run: Run, pair: Chunk, columns: Mapping[str, Tensor]) -> Upstream:
    """Keeps the gradients of every row by its log-probability and by its KL apart until the pair is complete."""
    run.flush()
    inputs, values = run.inputs, []
    apart = torch.empty(2, pair.count, inputs.head.width, dtype=inputs.logit_dtype, device=inputs.device)
    for rows in _blocks(run, pair):
        block = run.forward(rows)
        values.append(block.values)
        dz = run.buffers.dz[: len(block.states)]
        zeros, ones = torch.zeros_like(block.values[0]), torch.ones_like(block.values[0])
        for gradient, coefficients in zip(apart, ((ones, zeros), (zeros, ones))):
            share = gradient[rows.start - pair.rows.start :][: len(dz)]
            scale = run.form_dz(block, *coefficients, dz)
            inputs.head.hidden_gradient(dz, run.vocabulary, share)
            if scale is not None:
                share /= scale
    upstream = run.objective.upstream(torch.cat(values, dim=1), pair, columns)
    assert isinstance(run.gradients.hidden, HiddenGradient)
    for rows in _blocks(run, pair):  # a block at a time: what is rounded has memory of its own
        here = slice(rows.start - pair.rows.start, rows.stop - pair.rows.start)
        by_logps, by_kl = (
            # Selected: a gradient that is not wanted may be no number.
            gradient[here].masked_fill_(grad[here, None] == 0, 0).mul_(grad[here, None])
            for gradient, grad in zip(apart, (upstream.logps_grad, upstream.kl_grad))
        )
        run.gradients.hidden.put(rows, by_logps.add_(by_kl))
    return upstream


def _keep_block(run: Run, rows: slice, pair: Chunk, coefficients: Coefficients) -> Tensor:
    """The values of a block of a long pair; its dz is kept, without the pair's factor."""
    block = run.forward(rows)
    if run.wanted.any:
        of_block = coefficients.of_rows(slice(rows.start - pair.rows.start, rows.stop - pair.rows.start))
        run.keep_dz(block, of_block.logps_grad, of_block.kl_grad)
    return block.values


def _completed(
    run: Run, pair: Chunk, values: Tensor, columns: Mapping[str, Tensor], coefficients: Coefficients
) -> tuple[Upstream, Tensor]:
    """The loss of a pair whose values are all known, and the factor that its gradients lack."""
    upstream, factor = run.exchange.run(
        lambda: run.objective.link_upstream(values, pair, columns, coefficients),
        lambda: (run.objective.nothing(values, pair), values.new_zeros(())),
    )
    logps_grad, kl_grad = factor * coefficients.logps_grad, factor * coefficients.kl_grad
    return replace(upstream, logps_grad=logps_grad, kl_grad=kl_grad), factor


def _blocks(run: Run, pair: Chunk) -> list[slice]:
    """The rows of a long pair, as many at a time as there are logits."""
    first = pair.rows.start
    return [slice(first + rows.start, first + rows.stop) for rows in slices(pair.count, run.plan.rows)]


def _placeholder_values(run: Run, chunk: Chunk) -> Tensor:
    """Values before the logits are known: what a margin's coefficients may depend on, `tokens`, is right."""
    inputs, labels = run.inputs, run.labels[chunk.rows]
    values = torch.ones(operators.TOKEN_VALUES, len(labels), dtype=inputs.logit_dtype, device=inputs.device)
    values[TokenDivergence._fields.index("tokens")] = labels != inputs.options.ignore_index
    return values
