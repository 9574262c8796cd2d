"""Losses and log-probabilities of the policy alone: no reference is given, and none is computed."""

import functools

import pytest
import torch
import torch.distributed as dist

import tdpo_ext.fused.heads
import tdpo_ext.fused.inputs
import tdpo_ext.fused.rows
from helpers.distributed import run_on_ranks
from helpers.linear_cases import Case, kind_of, loss_and_gradients, make_case
from tdpo_ext import (
    MarginLoss,
    VocabShard,
    eager,
    linear_logps,
    linear_preference_loss,
    linear_token_divergence,
    linear_token_loss,
    per_token,
    reference_free,
    tdpo_loss,
)
from tdpo_ext.losses import is_reference_free, sees_tokens

pytestmark = pytest.mark.usefixtures("large_calls")


def mean_margin(chosen, rejected):
    return chosen.logps / chosen.tokens.clamp(min=1) - rejected.logps / rejected.tokens.clamp(min=1)


def link(margins):
    return -torch.nn.functional.logsigmoid(2.0 * margins - 0.5)


SIMPO = MarginLoss(mean_margin, link)
BUDGETS = {"one chunk": 1 << 30, "several chunks": 900_000, "deferred": 250_000, "streamed": 250_000}


def simpo(chosen, rejected):
    """As an ordinary function."""
    return link(mean_margin(chosen, rejected))


def without_reference(case):
    return Case(**{**vars(case), "ref_hidden": None, "ref_weight": None, "ref_bias": None})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BUDGETS)
def test_equals_the_loss_beside_a_reference_in_every_plan(kind, dtype, plans, monkeypatch):
    case = make_case(dtype, pairs=3, tokens=180, bias=True)
    objective = simpo if kind == "streamed" else SIMPO
    heads = set()
    logits = tdpo_ext.fused.heads.Head.logits

    def recorded(head, *arguments, **options):
        heads.add(head.weights[0].data_ptr())
        return logits(head, *arguments, **options)

    monkeypatch.setattr(tdpo_ext.fused.heads.Head, "logits", recorded)
    budget = BUDGETS[kind] * (2 if dtype == torch.float64 else 1)
    options = {"temperature": 1.3, "softcap": 4.0, "logits_budget": budget}
    loss, sides, grads = loss_and_gradients(linear_preference_loss, without_reference(case), objective, **options)
    assert kind_of(plans[-1]) == kind
    assert len(heads) == 1  # of the policy alone
    options.pop("logits_budget")
    truth, true_sides, true_grads = loss_and_gradients(
        eager.linear_preference_loss, case, objective, dtype=torch.float64, **options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)
    for side, true_side in zip(sides, true_sides):
        for name in ("logps", "entropy", "tokens"):
            torch.testing.assert_close(getattr(side, name).double(), getattr(true_side, name), rtol=1e-5, atol=1e-5)
        assert side.ref_logps.isnan().all()
        assert side.kl.isnan().all()
    tolerance = 1e-11 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for name, grad in grads.items():
        error = (grad.double() - true_grads[name]).norm() / true_grads[name].norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


def test_takes_less_memory_than_beside_a_reference(plans):
    case = make_case(pairs=2, tokens=50)
    for given in (case, without_reference(case)):
        linear_preference_loss(SIMPO, **given.tensors(), logits_budget=1 << 30)
    beside, alone = plans
    assert alone.bytes < 0.6 * beside.bytes


@pytest.mark.parametrize("budget", [1 << 30, 100_000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_log_probabilities(dtype, budget):
    case = make_case(dtype, bias=True)
    tensors = case.tensors()
    options = {"temperature": 0.8, "softcap": 4.0, "logit_scale": 0.9}
    leaves = [tensors[name] for name in ("hidden", "weight", "bias")]
    logps = linear_logps(*leaves[:2], case.labels, bias=leaves[2], logits_budget=budget, **options)
    divergence = linear_token_divergence(**tensors, **options)
    assert torch.equal(logps, divergence.logps) or budget == 100_000
    upstream = torch.randn_like(logps)
    grads = torch.autograd.grad(logps, leaves, upstream)
    expected = torch.autograd.grad(divergence.logps, leaves, upstream)
    torch.testing.assert_close(logps, divergence.logps)
    for grad, true in zip(grads, expected):
        torch.testing.assert_close(grad, true)


def test_values_of_a_reference_are_not_numbers_and_have_no_gradient():
    case = make_case()
    tensors = case.tensors() | {"ref_hidden": None, "ref_weight": None, "ref_bias": None}
    values = linear_token_divergence(**tensors)
    counts = case.labels != -100
    assert values.kl[counts].isnan().all()
    assert values.ref_logps[counts].isnan().all()
    assert (values.kl[~counts] == 0).all()
    assert not values.kl.requires_grad


def sharded(rank, world, device):
    case = make_case(torch.float64, pairs=2, tokens=120, bias=True)
    columns = slice(0, 120) if rank == 0 else slice(120, None)
    shard = VocabShard(*((0, 120) if rank == 0 else (120, 301)), dist.group.WORLD)
    part = case.of_columns(columns)
    whole, _, true_grads = loss_and_gradients(eager.linear_preference_loss, case, simpo)
    for budget in (1 << 30, 100_000):
        loss, _, grads = loss_and_gradients(
            linear_preference_loss, without_reference(part), simpo, shard=shard, logits_budget=budget
        )
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(grads["hidden"], true_grads["hidden"])
        torch.testing.assert_close(grads["weight"], true_grads["weight"][columns])


def test_a_sharded_vocabulary(tmp_path):
    outcomes = run_on_ranks({"sharded": sharded}, 2, "cpu", tmp_path)
    assert not any(outcomes.values()), outcomes


@per_token
def reads_the_kl(rows):
    return rows.sum(rows.kl)


def compares_the_kl(chosen, rejected):
    return -(chosen.kl < 3.0).float() * (chosen.logps - rejected.logps) + 0 * chosen.logps


def replaces_what_is_no_number(chosen, rejected):
    return chosen.logps - torch.nan_to_num(rejected.kl) - rejected.logps


@per_token
def selects_by_the_reference(chosen, rejected):
    sides = [side.sum(torch.where(side.ref_logps > -4, side.logps, 0.0)) for side in (chosen, rejected)]
    return sides[1] - sides[0] + 1e-3 * chosen.sum(chosen.logps)


@pytest.mark.parametrize(
    ("function", "objective"),
    [
        (linear_preference_loss, functools.partial(tdpo_loss, beta=0.1)),
        (linear_preference_loss, compares_the_kl),
        (linear_preference_loss, replaces_what_is_no_number),
        (linear_preference_loss, selects_by_the_reference),
        (linear_preference_loss, lambda chosen, rejected: chosen.logps - 0 * rejected.ref_logps),
        (linear_token_loss, reads_the_kl),
    ],
)
def test_an_objective_that_reads_the_reference_is_refused(function, objective):
    with pytest.raises(ValueError, match="objective reads ref_logps or kl, but there is no reference"):
        function(objective, **vars(without_reference(make_case())))


def test_an_objective_is_tried_again_without_a_reference():
    case = make_case()
    objective = functools.partial(tdpo_loss, beta=0.1)
    linear_preference_loss(objective, **vars(case))
    with pytest.raises(ValueError, match="there is no reference"):
        linear_preference_loss(objective, **vars(without_reference(case)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_hidden": None}, "ref_hidden is None but ref_weight is given; both are needed, or neither"),
        ({"ref_weight": None}, "ref_weight is None but ref_hidden is given"),
        ({"ref_hidden": None, "ref_weight": None}, "ref_bias is given, but ref_hidden and ref_weight are None"),
        (
            {"ref_hidden": None, "ref_weight": None, "ref_bias": None, "kl_direction": "reverse"},
            "kl_direction is 'reverse', but there is no reference",
        ),
        (
            {"ref_hidden": None, "ref_weight": None, "ref_bias": None, "ref_logit_scale": 2.0},
            "ref_logit_scale is 2.0, but there is no reference",
        ),
    ],
)
def test_half_a_reference_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(SIMPO, **{**vars(make_case(bias=True)), **change})


def test_autocast_casts_once(monkeypatch):
    tensors, copies = without_reference(make_case(vocab=1001)).tensors(), []
    original, weight = torch.Tensor.to, tensors["weight"]

    def to(tensor, *arguments, **options):
        result = original(tensor, *arguments, **options)
        if result is not tensor and (tensor.device, tensor.data_ptr()) == (weight.device, weight.data_ptr()):
            copies.append(result)
        return result

    monkeypatch.setattr(torch.Tensor, "to", to)
    with torch.autocast(tensors["hidden"].device.type, torch.bfloat16):
        linear_preference_loss(SIMPO, **tensors)
    assert len({copy.data_ptr() for copy in copies}) == 1  # torch.device, as a context, calls `to` from within `to`


def test_what_can_be_decorated():
    partial = reference_free(functools.partial(simpo))
    assert is_reference_free(partial)
    assert is_reference_free(MarginLoss(reference_free(lambda *sides: mean_margin(*sides)), link))
    assert not is_reference_free(simpo)
    assert sees_tokens(per_token(functools.partial(simpo)))
    with pytest.raises(TypeError, match="decorate its margin"):
        reference_free(SIMPO)


def test_rows_that_are_ignored_may_hold_anything(monkeypatch):
    """Where the host would wait to know them, as on a GPU, they are not dropped."""
    monkeypatch.setattr(tdpo_ext.fused.rows, "reading_is_free", lambda device: False)
    monkeypatch.setattr(tdpo_ext.fused.inputs, "reading_is_free", lambda device: False)
    case = make_case()
    tensors = case.tensors()
    linear_logps(tensors["hidden"], tensors["weight"], case.labels).sum().backward()
    expected = tensors["weight"].grad.clone()
    broken = case.hidden.clone()
    broken[case.labels == -100] = torch.nan
    weight = case.weight.clone().requires_grad_()
    linear_logps(broken, weight, case.labels).sum().backward()
    torch.testing.assert_close(weight.grad, expected)
