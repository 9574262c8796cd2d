"""A default device that is not the tensors' changes nothing: what the library makes lies where it says."""

import functools

import pytest
import torch

import tdpo_ext
from helpers.linear_cases import BUDGETS, OBJECTIVES, loss_and_gradients, make_case
from tdpo_ext import per_token, tdpo_loss, token_divergence


@pytest.fixture
def elsewhere():
    """Whatever is made without a device has no values, as on a meta device."""
    return torch.device("meta")


def fresh(objective):
    """An objective that the library has not tried yet."""
    return functools.partial(objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fused_losses(objective, budget, dtype, elsewhere):
    case, options = make_case(dtype, bias=True), {"logits_budget": BUDGETS[budget]}
    function = OBJECTIVES[objective]
    expected = loss_and_gradients(tdpo_ext.linear_preference_loss, case, function, **options)
    with elsewhere:
        ours = loss_and_gradients(tdpo_ext.linear_preference_loss, case, fresh(function), **options)
    assert torch.equal(ours[0], expected[0])
    assert all(torch.equal(grad, expected[2][name]) for name, grad in ours[2].items())


@pytest.mark.parametrize("budget", [1 << 30, 100])
def test_packed_rows_with_columns(budget, elsewhere):
    @per_token
    def weighted(chosen, rejected):
        w, l = chosen.columns["weight"], rejected.columns["weight"]
        return -(chosen.sum(w * chosen.logratio) - rejected.sum(l * rejected.logratio))

    hidden, weight = torch.randn(9, 8).requires_grad_(), torch.randn(31, 8).requires_grad_()
    labels, numbers = torch.randint(31, (9,)), torch.rand(9)

    def loss(objective):
        return tdpo_ext.linear_preference_loss(
            objective,
            *(hidden, weight, hidden.detach(), weight.detach(), labels),
            row_lengths=[4, 5],
            token_columns={"weight": numbers},
            logits_budget=budget,
        )[0]

    expected = loss(weighted)
    with elsewhere:
        ours = loss(per_token(functools.partial(weighted)))
    assert torch.equal(ours, expected)


def test_token_divergence(elsewhere):
    logits, labels = torch.randn(5, 40), torch.randint(40, (5,))
    expected = token_divergence(logits, -logits, labels)
    with elsewhere:
        ours = token_divergence(logits, -logits, labels)
    assert all(map(torch.equal, ours, expected))


def test_the_module(elsewhere):
    tensors = make_case(torch.float32).tensors()
    with elsewhere:
        loss = tdpo_ext.LinearTDPOLoss(beta=0.1)(**tensors)[0]
    objective = functools.partial(tdpo_loss, beta=0.1)
    assert torch.equal(loss, tdpo_ext.linear_preference_loss(objective, **tensors)[0])
