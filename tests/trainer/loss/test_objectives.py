"""Every objective that has a name, against float64 autograd of its formula on materialised logits."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tdpo.loss.objectives import OBJECTIVES, weighted_sum
from tdpo.option_checks import check_objective_options
from tdpo.options import REFERENCE_FREE, USED_BY, ObjectiveOptions
from torch.nn.functional import logsigmoid

from helpers.distributed import run_on_ranks
from helpers.linear_cases import make_case
from tdpo_ext import MarginLoss, VocabShard, eager, linear_preference_loss
from tdpo_ext.losses import is_reference_free

OPTIONS = ObjectiveOptions(beta=0.3, alpha=0.7, label_smoothing=0.1, simpo_gamma=0.4)
BUDGETS = {"one chunk": 1 << 30, "two chunks": 90_000, "many chunks": 50_000, "long pairs": 20_000}
DOCUMENT = Path(__file__).parents[3] / "docs" / "objectives.md"


class Sums:
    """A side's (B, T) values, as the formulas of the papers have them."""

    def __init__(self, divergence, labels, weight, half):
        self.logps, self.ref_logps, self.kl = (
            value[half] for value in (divergence.logps, divergence.ref_logps, divergence.kl)
        )
        self.tokens, self.weight = (labels[half] != -100).sum(-1).clamp(min=1), weight[half]

    def logratio(self):
        return (self.logps - self.ref_logps).sum(-1)

    def weighted(self, values):
        return (self.weight * values).sum(-1)


def tis_dpo(w, l):
    u = w.weighted(w.logps - w.ref_logps) - l.weighted(l.logps - l.ref_logps)
    return -logsigmoid(0.3 * (u - 0.7 * (w.weighted(w.kl) - l.weighted(l.kl))))


def dpo(w, l):
    u = 0.3 * (w.logratio() - l.logratio())
    return -0.9 * logsigmoid(u) - 0.1 * logsigmoid(-u)


FORMULAS = {
    "tdpo2": lambda w, l: (
        -logsigmoid(0.3 * (w.logratio() - l.logratio() - 0.7 * (l.kl.sum(-1) - w.kl.sum(-1).detach())))
    ),
    "tdpo1": lambda w, l: -logsigmoid(0.3 * (w.logratio() - l.logratio() - (l.kl.sum(-1) - w.kl.sum(-1)))),
    "dpo": dpo,
    "ipo": lambda w, l: (w.logratio() / w.tokens - l.logratio() / l.tokens - 1 / 0.6) ** 2,
    "simpo": lambda w, l: -logsigmoid(0.3 * (w.logps.sum(-1) / w.tokens - l.logps.sum(-1) / l.tokens) - 0.4),
    "tis_dpo": tis_dpo,
}


def truth_of(name, case, weight):
    tensors = case.tensors(torch.float64)
    weight = weight.double().requires_grad_()
    divergence = eager.linear_token_divergence(**tensors, kl_direction=OBJECTIVES[name].kl_direction)
    pairs = len(case.labels) // 2
    sides = [Sums(divergence, case.labels, weight, half) for half in (slice(0, pairs), slice(pairs, None))]
    loss = FORMULAS[name](*sides).mean()
    leaves = {n: t for n, t in {**tensors, "weight column": weight}.items() if t is not None and t.requires_grad}
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(leaves, grads))


def fused(name, case, weight, **options):
    objective = OBJECTIVES[name]
    tensors, weight = case.tensors(), weight.detach().requires_grad_()
    columns = {"weight": weight} if objective.columns else None
    loss, _, _ = linear_preference_loss(
        objective.build(OPTIONS), **tensors, token_columns=columns, kl_direction=objective.kl_direction, **options
    )
    loss.backward()
    leaves = {**tensors, "weight column": weight}
    grads = {n: t.grad for n, t in leaves.items() if t is not None and t.requires_grad}
    return loss.detach(), {n: torch.zeros_like(leaves[n]) if g is None else g for n, g in grads.items()}


def assert_matches(found, truth, tolerance):
    torch.testing.assert_close(found[0].double(), truth[0], rtol=tolerance, atol=tolerance)
    for name, expected in truth[1].items():
        error = (found[1][name].double() - expected).norm() / expected.norm().clamp(min=1e-2)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def make_weighted_case(dtype=torch.float64):
    case = make_case(dtype, pairs=4, tokens=15, bias=True)
    return case, (torch.rand(case.labels.shape) + 0.5).to(dtype)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_formulas(name, budget, dtype):
    case, weight = make_weighted_case(dtype)
    found = fused(name, case, weight, logits_budget=BUDGETS[budget] * dtype.itemsize // 4)
    assert_matches(found, truth_of(name, case, weight), 1e-9 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("name", [name for name, objective in OBJECTIVES.items() if not objective.columns])
def test_streamed(name):
    """The same as an ordinary function of a pair, which streams where a pair is long."""
    case, weight = make_weighted_case()
    objective, tensors = OBJECTIVES[name].build(OPTIONS), case.tensors()
    loss, _, _ = linear_preference_loss(lambda *sides: objective(*sides), **tensors, logits_budget=40_000)
    loss.backward()
    truth = truth_of(name, case, weight)
    torch.testing.assert_close(loss.detach(), truth[0])
    torch.testing.assert_close(tensors["hidden"].grad, truth[1]["hidden"])
    torch.testing.assert_close(tensors["weight"].grad, truth[1]["weight"])


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("short", [0, 2, 5, 7])  # of the sequences, chosen ones first
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_response_of_no_or_one_token(name, short, left):
    """Without tokens its sums are zero, and so are its means over tokens."""
    case, weight = make_weighted_case()
    case.labels[short, left:] = -100
    case.labels[short, :left] = 7
    found = fused(name, case, weight)
    truth = truth_of(name, case, weight)
    assert truth[0].isfinite()
    assert_matches(found, truth, 1e-9)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed(name):
    case, weight = make_weighted_case()
    kept = case.labels != -100
    objective, tensors = OBJECTIVES[name], case.tensors()
    tensors |= {n: tensors[n].detach()[kept] for n in ("hidden", "ref_hidden", "labels")}
    tensors["hidden"].requires_grad_()
    loss, _, _ = linear_preference_loss(
        objective.build(OPTIONS),
        **tensors,
        row_lengths=kept.sum(-1).tolist(),
        token_columns={"weight": weight[kept]} if objective.columns else None,
        kl_direction=objective.kl_direction,
        logits_budget=90_000,
    )
    loss.backward()
    truth = truth_of(name, case, weight)
    torch.testing.assert_close(loss.detach(), truth[0])
    torch.testing.assert_close(tensors["hidden"].grad, truth[1]["hidden"][kept])


def on_two_ranks(rank, world, device):
    shard = VocabShard.from_group(301, dist.group.WORLD)
    for name in OBJECTIVES:
        torch.manual_seed(3)
        case, weight = make_weighted_case()
        truth = truth_of(name, case, weight)
        rows = slice(shard.start, shard.stop)
        for head in ("weight", "bias", "ref_weight", "ref_bias"):
            setattr(case, head, getattr(case, head)[rows])
        for budget in BUDGETS.values():
            found = fused(name, case, weight, shard=shard, logits_budget=2 * budget)
            local = {n: grad[rows] if n in ("weight", "bias") else grad for n, grad in truth[1].items()}
            if OBJECTIVES[name].columns == ():
                local.pop("weight column")
            assert_matches(found, (truth[0], local), 1e-9)


@pytest.mark.slow
def test_sharded(tmp_path):
    outcomes = run_on_ranks({"objectives": on_two_ranks}, 2, "cpu", tmp_path)
    assert not {rank: trace for rank, trace in outcomes.items() if trace}


def test_weighted_sums():
    dpo, ipo = OBJECTIVES["dpo"].build(OPTIONS), OBJECTIVES["ipo"].build(OPTIONS)
    again = MarginLoss(dpo.margin, torch.exp)
    case, _ = make_weighted_case()

    def loss_of(objective):
        return linear_preference_loss(objective, **case.tensors())[0]

    same = weighted_sum([(0.5, dpo), (2.0, again)])
    assert isinstance(same, MarginLoss)
    torch.testing.assert_close(loss_of(same), 0.5 * loss_of(dpo) + 2.0 * loss_of(again))
    torch.testing.assert_close(loss_of(weighted_sum([(2.0, dpo)])), 2.0 * loss_of(dpo))
    other = weighted_sum([(0.5, dpo), (2.0, ipo)])
    assert not isinstance(other, MarginLoss)
    torch.testing.assert_close(loss_of(other), 0.5 * loss_of(dpo) + 2.0 * loss_of(ipo))


def test_the_document_has_every_objective():
    text = DOCUMENT.read_text()
    assert USED_BY.keys() == OBJECTIVES.keys()
    for name, objective in OBJECTIVES.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"`{objective.formula}`" in row
        assert objective.source in row
        assert all(f"`{option}`" in row for option in USED_BY[name])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tdpo2", {"beta": 0.0}, "beta is 0"),
        ("tdpo2", {"alpha": -0.1}, "alpha is -0.1"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing is 0.5"),
        ("simpo", {"simpo_gamma": -1.0}, "simpo_gamma is -1"),
        ("tdpo1", {"alpha": 0.7}, "alpha is 0.7, but the loss tdpo1 does not use it: leave it unset"),
        ("tdpo2", {"label_smoothing": 0.1}, "label_smoothing is 0.1, but the loss tdpo2 does not use it"),
        ("dpo", {"simpo_gamma": 0.7}, "simpo_gamma is 0.7, but the loss dpo does not use it"),
    ],
)
def test_options_out_of_range_or_without_a_use_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        check_objective_options(ObjectiveOptions(variant=name, **options))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_defaults_and_its_own_options_are_those_of_an_objective(name):
    check_objective_options(ObjectiveOptions(variant=name))
    used = {option: getattr(OPTIONS, option) for option in USED_BY[name]}
    check_objective_options(ObjectiveOptions(variant=name, **used))


class Scaled:
    def __call__(self, chosen, rejected):
        return chosen.logps


def test_which_objectives_need_no_reference():
    """The command line knows it without importing torch."""
    free = {name for name, named in OBJECTIVES.items() if is_reference_free(named.build(OPTIONS))}
    assert free == set(REFERENCE_FREE)
