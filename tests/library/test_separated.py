"""Any loss of a frozen head, at any length: both parts of dhidden are kept until the loss is known; no recompute."""

import pytest
import torch

import tdpo_ext.fused.heads
from helpers.linear_cases import loss_and_gradients, make_case
from tdpo_ext import eager, linear_preference_loss, linear_token_loss, per_token
from tdpo_ext.ops.matmul import product

pytestmark = pytest.mark.usefixtures("large_calls")

BUDGET = 450_000
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}


def squared(chosen, rejected):
    return (0.05 * (chosen.logratio - rejected.logratio) - 0.1 * chosen.kl - 0.2 * rejected.kl - 1.0) ** 2


def frozen_case(dtype, **options):
    case = make_case(dtype, pairs=2, tokens=150, ref_width=16, ignored=0.1, **options)
    return case, {name: t for name, t in vars(case).items() if t is not None}


def hidden_gradient(function, tensors, objective=squared, dtype=None, **options):
    """Of a frozen head, times the factor of a GradScaler, in float64."""
    tensors = {n: t.to(dtype) if dtype and t.is_floating_point() else t for n, t in tensors.items()}
    hidden = tensors["hidden"].clone().requires_grad_()
    loss, *_ = function(objective, **{**tensors, "hidden": hidden}, **options)
    return loss.detach(), torch.autograd.grad(1024 * loss, hidden)[0].double()


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_gradient_of_hidden_states(dtype, direction, plans):
    _, tensors = frozen_case(dtype, bias=True)
    loss, grad = hidden_gradient(
        linear_preference_loss, tensors, logits_budget=2 * BUDGET if dtype == torch.float64 else BUDGET,
        kl_direction=direction,
    )  # fmt: skip
    assert plans[-1].separates
    assert plans[-1].deferred
    truth, exact = hidden_gradient(eager.linear_preference_loss, tensors, dtype=torch.float64, kl_direction=direction)
    assert loss.item() == pytest.approx(truth.item(), rel=1e-4)
    assert (grad - exact).norm() < TOLERANCES[dtype] * exact.norm()


def test_four_products_and_no_recompute(plans, monkeypatch):
    _, tensors = frozen_case(torch.float32)
    rows = {"logits": 0, "gradients": 0}

    def counted(a, b, out, **options):
        rows["logits" if out.shape[1] == len(tensors["weight"]) else "gradients"] += len(a)
        return product(a, b, out, **options)

    monkeypatch.setattr(tdpo_ext.fused.heads, "product", counted)
    hidden_gradient(linear_preference_loss, tensors, logits_budget=BUDGET)
    assert plans[-1].separates
    counting = int((tensors["labels"] != -100).sum())
    assert rows == {"logits": 2 * counting, "gradients": 2 * counting}
    assert plans[-1].steps.separate_rows == counting


def test_losses_of_sequences_alone(plans):
    _, tensors = frozen_case(torch.float32)

    @per_token
    def bounded(values):
        return values.sum(values.kl.tanh() - 0.1 * values.logratio)

    _, grad = hidden_gradient(linear_token_loss, tensors, bounded, logits_budget=315_000)
    assert plans[-1].separates
    _, whole = hidden_gradient(linear_token_loss, tensors, bounded)
    assert (grad - whole).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize(("direction", "masked"), [("forward", "bias"), ("reverse", "ref_bias")])
def test_a_kl_that_is_not_read_may_be_no_number(direction, masked, plans):
    """A token has no probability under one model: the KL is infinite and, of the reverse one, so is its gradient."""
    case, tensors = frozen_case(torch.float32, bias=True)
    tensors[masked] = tensors[masked].clone()
    tensors[masked][-1] = -torch.inf

    def without_kl(chosen, rejected):
        return (chosen.logratio - rejected.logratio - 1.0) ** 2

    tensors["labels"] = tensors["labels"].clamp(max=len(case.weight) - 2)
    options = {"logits_budget": BUDGET, "kl_direction": direction}
    _, grad = hidden_gradient(linear_preference_loss, tensors, without_kl, **options)
    assert plans[-1].separates
    assert grad.isfinite().all()


def test_columns_alone(plans):
    """Nothing of hidden states is wanted, and no product taken for it."""
    case, tensors = frozen_case(torch.float32)
    columns = {"weight": torch.rand(case.labels.shape, requires_grad=True)}

    @per_token
    def weighted(chosen, rejected):
        return (chosen.sum(chosen.columns["weight"] * chosen.logratio) - rejected.sum(rejected.logratio)) ** 2

    grads = []
    for budget in (BUDGET, 1 << 30):
        loss, *_ = linear_preference_loss(weighted, **tensors, token_columns=columns, logits_budget=budget)
        grads += torch.autograd.grad(loss, columns["weight"])
    assert plans[-2].deferred
    torch.testing.assert_close(*grads)


def test_a_head_that_trains_is_streamed(plans):
    case, _ = frozen_case(torch.float32)
    loss_and_gradients(linear_preference_loss, case, squared, logits_budget=BUDGET)
    assert str(plans[-1]).startswith("streaming")
