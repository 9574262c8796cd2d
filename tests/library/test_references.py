"""References that differ from the policy: in dtype, and in the scale of their logits."""

import dataclasses

import pytest
import torch

from helpers.linear_cases import BUDGETS, OBJECTIVES, loss_and_gradients, make_case
from helpers.logit_cases import random_rows
from tdpo_ext import LinearTDPOLoss, eager, linear_preference_loss, linear_token_divergence, token_divergence

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALES = {"logit_scale": 0.25, "ref_logit_scale": 0.4}


def check(case, budget, objective="tdpo2", **options):
    function = OBJECTIVES[objective]
    loss, sides, grads = loss_and_gradients(linear_preference_loss, case, function, logits_budget=budget, **options)
    truth, true_sides, true_grads = loss_and_gradients(
        eager.linear_preference_loss, case, function, dtype=torch.float64, **options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    for value, expected in zip(sides[1], true_sides[1]):
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=1e-5)
    for name, grad in grads.items():
        assert grad.dtype == case.hidden.dtype
        error = (grad.double() - true_grads[name]).norm() / true_grads[name].norm()
        assert error < max(2 * torch.finfo(case.hidden.dtype).eps, 2e-5), f"{name}: {error:.2e}"


def mixed_case(dtype, ref_dtype):
    case, reference = make_case(dtype, bias=True), make_case(ref_dtype, bias=True)
    return dataclasses.replace(
        case, ref_hidden=reference.ref_hidden, ref_weight=reference.ref_weight, ref_bias=reference.ref_bias
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ref_dtype", DTYPES)
@pytest.mark.parametrize("budget", ["one chunk", "several chunks", "streamed"])
def test_dtypes_of_hidden_states(dtype, ref_dtype, budget):
    check(mixed_case(dtype, ref_dtype), BUDGETS[budget])


def test_a_low_precision_reference_of_a_float64_policy():
    case = mixed_case(torch.float64, torch.bfloat16)
    ours = linear_token_divergence(**case.tensors(), logits_budget=30_000)
    truth = eager.linear_token_divergence(**case.tensors(torch.float64))
    for value, expected in zip(ours, truth):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_a_float64_reference_of_a_float32_policy_is_refused():
    with pytest.raises(TypeError, match=r"ref_hidden has dtype torch\.float64"):
        linear_preference_loss(OBJECTIVES["dpo"], **mixed_case(torch.float32, torch.float64).tensors())


@pytest.mark.parametrize("name", ["ref_weight", "ref_bias", "weight", "bias"])
def test_a_model_has_one_dtype(name):
    tensors = mixed_case(torch.float32, torch.bfloat16).tensors()
    tensors[name] = tensors[name].detach().half()
    with pytest.raises(TypeError, match=rf"{name} has dtype torch\.float16"):
        linear_preference_loss(OBJECTIVES["dpo"], **tensors)


@pytest.mark.parametrize(
    ("dtype", "ref_dtype"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float32, torch.float64),
    ],
)
def test_dtypes_of_logits(dtype, ref_dtype):
    logits, ref_logits, labels = random_rows(5, 507, torch.float64, ignored=[2])
    logits, ref_logits = logits.to(dtype), ref_logits.to(ref_dtype)
    leaf, double = logits.clone().requires_grad_(), logits.double().requires_grad_()
    ours = token_divergence(leaf, ref_logits, labels)
    truth = eager.token_divergence(double, ref_logits.double(), labels)
    for value, expected in zip(ours, truth):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    for divergence in (ours, truth):
        (divergence.logps - divergence.kl).sum().backward()
    assert leaf.grad.dtype == dtype
    torch.testing.assert_close(leaf.grad.double(), double.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 2.0}, {"kl_direction": "reverse"}])
@pytest.mark.parametrize("scales", [SCALES, {"logit_scale": 3.0, "ref_logit_scale": 3.0}])
def test_scales(budget, options, scales):
    for objective in ("tdpo1", "ipo"):
        check(make_case(bias=True), BUDGETS[budget], objective, **options, **scales)


@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_scales_of_token_values(budget):
    """Their gradient is recomputed in backward, with the scales of the call."""
    case = make_case(bias=True)
    tensors, truth = case.tensors(), case.tensors(torch.float64)
    for function, arguments in (
        (lambda **a: linear_token_divergence(**a, logits_budget=budget), tensors),
        (eager.linear_token_divergence, truth),
    ):
        divergence = function(**arguments, **SCALES)
        (divergence.kl - divergence.logps).sum().backward()
    for name in ("hidden", "weight", "bias"):
        error = (tensors[name].grad.double() - truth[name].grad).norm() / truth[name].grad.norm()
        assert error < 1e-6, name


def test_equal_scales_keep_the_signal_near_equality():
    """A common scale joins the temperature, so that z - r stays exact."""
    case = make_case(width=64, ref_width=64, vocab=5003, ignored=0.0)
    case = dataclasses.replace(
        case, ref_weight=case.weight, ref_hidden=case.hidden + 1e-3 * torch.randn_like(case.hidden)
    )
    scales = {"logit_scale": 0.3, "ref_logit_scale": 0.3}
    truth = eager.linear_token_divergence(**case.tensors(torch.float64), **scales).kl
    errors = [
        ((function(**case.tensors(), **scales).kl - truth).norm() / truth.norm()).item()
        for function in (linear_token_divergence, eager.linear_token_divergence)
    ]
    assert errors[0] < errors[1] / 10


def test_scales_too_far_apart_are_refused():
    with pytest.raises(ValueError, match="temperature / logit_scale"):
        LinearTDPOLoss(temperature=1e20, logit_scale=1e-20)
    with pytest.raises(ValueError, match="ref_logit_scale / logit_scale"):
        LinearTDPOLoss(temperature=1e-10, logit_scale=1e-20, ref_logit_scale=1e20)
