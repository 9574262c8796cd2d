"""The fused losses on a GPU (`pytest -m cuda`), against the float64 oracle and against the CPU."""

import functools
from dataclasses import replace

import pytest
import torch

import tdpo_ext
from helpers.cuda_support import gpu
from helpers.linear_cases import BUDGETS, OBJECTIVES, loss_and_gradients, make_case
from tdpo_ext import eager, tdpo_loss


def on_gpu(case):
    return replace(case, **{name: value.cuda() for name, value in vars(case).items() if value is not None})


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_fused_loss_on_gpu(dtype, budget, objective):
    case = on_gpu(make_case(dtype, bias=True))
    function, options = OBJECTIVES[objective], {"logits_budget": BUDGETS[budget]}
    loss, _, grads = loss_and_gradients(tdpo_ext.linear_preference_loss, case, function, **options)
    truth, _, true_grads = loss_and_gradients(eager.linear_preference_loss, case, function, dtype=torch.float64)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-4)
    for name, grad in grads.items():
        error = (grad.double() - true_grads[name]).norm() / true_grads[name].norm()
        assert error < max(2 * torch.finfo(dtype).eps, 1e-3), name


@gpu
def test_low_precision_keeps_the_kl_near_equality():
    case = on_gpu(make_case(torch.bfloat16, pairs=2, tokens=32, width=256, ref_width=256, vocab=16000, ignored=0.0))
    case = replace(
        case,
        ref_weight=case.weight,
        ref_hidden=(case.hidden.float() + 1e-2 * torch.randn_like(case.hidden.float())).bfloat16(),
    )
    tensors = case.tensors()
    truth = eager.linear_token_divergence(**case.tensors(torch.float64)).kl
    ours = tdpo_ext.linear_token_divergence(**tensors).kl
    assert ((ours - truth).norm() / truth.norm()).item() < 1e-3


@gpu
def test_fused_loss_is_repeatable_on_gpu():
    case = on_gpu(make_case(torch.bfloat16, pairs=4, tokens=40, width=64, vocab=5003))
    objective = functools.partial(tdpo_loss, beta=0.1)
    runs = [
        loss_and_gradients(tdpo_ext.linear_preference_loss, case, objective, logits_budget=1 << 20) for _ in range(3)
    ]
    for loss, _, grads in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert all(torch.equal(grad, runs[0][2][name]) for name, grad in grads.items())
