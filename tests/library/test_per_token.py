"""Per-token objectives: each against float64 autograd of its formula on materialised logits, whatever the plan."""

import functools

import pytest
import torch
from torch.nn.functional import logsigmoid

from helpers.linear_cases import make_case
from tdpo_ext import MarginLoss, eager, linear_preference_loss, per_token

BETA, ALPHA, GAMMA = 0.1, 0.5, 0.98
BUDGETS = {"one chunk": 1 << 30, "several chunks": 110_000, "streamed": 30_000}


@per_token
def tis_dpo(chosen, rejected):
    """TIS-DPO (arXiv 2410.04350): log-ratios and KLs weighed token by token."""
    w, l = chosen.columns["importance"], rejected.columns["importance"]
    logratios = chosen.sum(w * chosen.logratio) - rejected.sum(l * rejected.logratio)
    return -logsigmoid(BETA * (logratios - ALPHA * (chosen.sum(w * chosen.kl) - rejected.sum(l * rejected.kl))))


def tis_dpo_formula(w, l):
    logratios = (w.importance * w.logratio).sum(-1) - (l.importance * l.logratio).sum(-1)
    kls = (w.importance * w.kl).sum(-1) - (l.importance * l.kl).sum(-1)
    return -logsigmoid(BETA * (logratios - ALPHA * kls))


@per_token
def confpo(chosen, rejected):
    """ConfPO (arXiv 2506.08712): the mean over tokens of below-average confidence."""

    def selected_mean(side):
        average = (side.sum(side.logps.detach().exp()) / side.lengths.clamp(min=1)).log()
        rows = side.rows_of_pair
        below = (side.logps.detach() < average.repeat_interleave(rows, output_size=len(side.logps))).double()
        return side.sum(below * side.logps) / side.sum(below).clamp(min=1)

    return -logsigmoid(BETA * (selected_mean(chosen) - selected_mean(rejected)))


def confpo_formula(w, l):
    def selected_mean(side):
        length = side.counts.sum(-1).clamp(min=1)
        average = ((side.logps.detach().exp() * side.counts).sum(-1) / length).log()[:, None]
        below = side.counts * (side.logps.detach() < average)
        return (below * side.logps).sum(-1) / below.sum(-1).clamp(min=1)

    return -logsigmoid(BETA * (selected_mean(w) - selected_mean(l)))


@per_token
def simpo_style_mean(chosen, rejected):
    return -logsigmoid(chosen.mean(chosen.logps) - rejected.mean(rejected.logps) - 0.3)


def simpo_style_mean_formula(w, l):
    means = [side.logps.sum(-1) / side.counts.sum(-1).clamp(min=1) for side in (w, l)]
    return -logsigmoid(means[0] - means[1] - 0.3)


@per_token
def sparse_margin(chosen, rejected):
    """SparsePO (arXiv 2410.05102): learned masks on log-ratios and on KLs."""
    u = [side.sum(side.columns["importance"] * side.logratio) for side in (chosen, rejected)]
    d = [side.sum(side.columns["mask"] * side.kl) for side in (chosen, rejected)]
    return u[0] - u[1] - (d[1] - d[0])


sparsepo = MarginLoss(sparse_margin, lambda margin: -logsigmoid(BETA * margin))


def sparsepo_formula(w, l):
    u = [(side.importance * side.logratio).sum(-1) for side in (w, l)]
    d = [(side.mask * side.kl).sum(-1) for side in (w, l)]
    return -logsigmoid(BETA * (u[0] - u[1] - (d[1] - d[0])))


OBJECTIVES = {
    "tis_dpo": (tis_dpo, tis_dpo_formula),
    "confpo": (confpo, confpo_formula),
    "simpo_style_mean": (simpo_style_mean, simpo_style_mean_formula),
    "sparsepo": (sparsepo, sparsepo_formula),
}


class PaddedSide:
    """(B, T) tensors of one side, as a formula on materialised logits has them."""

    def __init__(self, divergence, labels, columns, half):
        self.logps, self.kl, self.logratio = (
            value[half] for value in (divergence.logps, divergence.kl, divergence.logratio)
        )
        self.counts = (labels[half] != -100).double()
        self.importance, self.mask = columns["importance"][half], columns["mask"][half]


def by_formula(formula, case, columns):
    """Loss and gradients in float64."""
    tensors = case.tensors(torch.float64)
    columns = {name: column.double().detach().requires_grad_() for name, column in columns.items()}
    labels = tensors["labels"]
    divergence = eager.linear_token_divergence(**tensors)
    pairs = len(labels) // 2
    sides = [PaddedSide(divergence, labels, columns, half) for half in (slice(0, pairs), slice(pairs, None))]
    loss = formula(*sides).mean()
    leaves = {name: value for name, value in {**tensors, **columns}.items() if value is not None}
    leaves = {name: value for name, value in leaves.items() if value.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss, dict(zip(leaves, grads))


def by_fused_loss(objective, case, columns, **options):
    tensors = case.tensors()
    columns = {name: column.detach().requires_grad_() for name, column in columns.items()}
    loss, _, _ = linear_preference_loss(objective, **tensors, token_columns=columns, **options)
    loss.backward()
    leaves = {**tensors, **columns}
    return loss, {n: value.grad for n, value in leaves.items() if value is not None and value.requires_grad}


def make_columns(case):
    return {"importance": torch.rand(case.labels.shape) + 0.5, "mask": torch.rand(case.labels.shape)}


def assert_matches(found, truth, tolerance):
    loss, grads = found
    true_loss, true_grads = truth
    torch.testing.assert_close(loss.double(), true_loss, rtol=tolerance, atol=tolerance)
    for name, expected in true_grads.items():
        grad = torch.zeros_like(expected) if grads[name] is None else grads[name].double()
        error = (grad - expected).norm() / expected.norm().clamp(min=1e-2)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_objectives(name, budget, dtype):
    objective, formula = OBJECTIVES[name]
    case = make_case(dtype, pairs=4, tokens=13, bias=True)
    columns = {n: column.to(dtype) for n, column in make_columns(case).items()}
    found = by_fused_loss(objective, case, columns, logits_budget=BUDGETS[budget] * (2 if dtype.itemsize == 8 else 1))
    assert_matches(found, by_formula(formula, case, columns), 1e-9 if dtype == torch.float64 else 1e-4)


def test_a_weighted_margin_loss_defers():
    case = make_case(torch.float64, pairs=2, tokens=150)
    columns = {n: column.double() for n, column in make_columns(case).items()}
    found = by_fused_loss(sparsepo, case, columns, logits_budget=700_000)
    assert_matches(found, by_formula(sparsepo_formula, case, columns), 1e-9)


@pytest.mark.parametrize("lengths_known", [False, True])
def test_packed_rows(lengths_known):
    case = make_case(torch.float64, pairs=3, tokens=9)
    columns = {n: column.double() for n, column in make_columns(case).items()}
    loss, grads = by_fused_loss(tis_dpo, case, columns)
    kept = case.labels != -100
    lengths = kept.sum(-1)
    tensors = case.tensors()
    packed = {n: tensors[n].detach()[kept] for n in ("hidden", "ref_hidden", "labels")}
    options = {"cu_seqlens": torch.cat([torch.zeros(1), lengths.cumsum(0)]).long()}
    if lengths_known:
        options["row_lengths"] = lengths.tolist()
    packed["hidden"].requires_grad_()
    packed_columns = {n: column[kept].requires_grad_() for n, column in columns.items()}
    other, _, _ = linear_preference_loss(
        tis_dpo, **{**tensors, **packed}, token_columns=packed_columns, **options, logits_budget=90_000
    )
    other.backward()
    torch.testing.assert_close(other, loss)
    torch.testing.assert_close(packed["hidden"].grad, grads["hidden"][kept])
    torch.testing.assert_close(packed_columns["importance"].grad, grads["importance"][kept])


@per_token
def coupled(chosen, rejected):
    margins = chosen.sum(chosen.logratio) - rejected.sum(rejected.logratio)
    return -logsigmoid(margins - margins.detach().mean())


def test_coupled_pairs_are_refused():
    with pytest.raises(ValueError, match="couples pairs"):
        linear_preference_loss(coupled, **make_case().tensors())


@pytest.mark.parametrize(
    ("column", "error"),
    [
        (torch.ones(6, 10), ValueError),
        (torch.ones(6, 11, dtype=torch.int64), TypeError),
        ([1.0], TypeError),
    ],
)
def test_bad_columns_are_named(column, error):
    with pytest.raises(error, match=r"token_columns\['importance'\]"):
        linear_preference_loss(tis_dpo, **make_case().tensors(), token_columns={"importance": column})


def test_means_of_an_empty_response_are_zero():
    case = make_case(torch.float64, pairs=3, tokens=9)
    case.labels[1] = case.labels[5] = -100  # of the second pair's chosen and of the third's rejected response
    found = by_fused_loss(simpo_style_mean, case, make_columns(case))
    assert found[0].isfinite()
    assert_matches(found, by_formula(simpo_style_mean_formula, case, make_columns(case)), 1e-9)


@per_token
def raised_margin(chosen, rejected, *, target):
    return sparse_margin(chosen, rejected) - target


def raised_sparsepo_formula(w, l):
    return sparsepo_formula(w, l).exp().sub(1).log().add(BETA * 0.7).exp().add(1).log()


def raised_sparsepo(chosen, rejected, *, target):
    return -logsigmoid(BETA * raised_margin(chosen, rejected, target=target))


@pytest.mark.parametrize("kind", ["a function", "a margin"])
def test_partial_objectives_see_tokens(kind):
    partial = functools.partial
    if kind == "a margin":
        objective = MarginLoss(partial(raised_margin, target=0.7), lambda margin: -logsigmoid(BETA * margin))
    else:
        objective = partial(partial(per_token(raised_sparsepo)), target=0.7)
    case = make_case(torch.float64, pairs=2)
    columns = {name: column.double() for name, column in make_columns(case).items()}
    found = by_fused_loss(objective, case, columns)
    assert_matches(found, by_formula(raised_sparsepo_formula, case, columns), 1e-9)
