"""TF32 on a GPU (`pytest -m cuda`): logits never take it, however torch is told to allow it."""

import functools

import pytest
import torch

import tdpo_ext
from helpers.cuda_support import gpu
from tdpo_ext import tdpo_loss

matmul = torch.backends.cuda.matmul if torch.backends.cuda.is_built() else None


def allow(how):
    """One of torch's four ways, two of which can't be mixed with the others."""
    if how == "set_float32_matmul_precision":
        torch.set_float32_matmul_precision("high")
    elif how == "allow_tf32":
        matmul.allow_tf32 = True
    elif how == "matmul.fp32_precision":
        matmul.fp32_precision = "tf32"
    else:
        torch.backends.fp32_precision = "tf32"


@pytest.fixture
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.fp32_precision = matmul.fp32_precision = "none"


def kl_and_gradient(device, **options):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 20, 64), 0.3 * torch.randn(501, 64)
    ref_hidden, labels = hidden + 1e-3 * torch.randn_like(hidden), torch.randint(501, (4, 20))
    hidden, weight, ref_hidden, labels = (tensor.to(device) for tensor in (hidden, weight, ref_hidden, labels))
    hidden.requires_grad_()
    loss, chosen, _ = tdpo_ext.linear_preference_loss(
        functools.partial(tdpo_loss, beta=0.1), hidden, weight, ref_hidden, weight.detach(), labels, **options
    )
    return chosen.kl.cpu(), torch.autograd.grad(loss, hidden)[0].cpu()


@gpu
@pytest.mark.parametrize("options", [{}, {"logits_budget": 100}], ids=["chunked", "streamed"])
@pytest.mark.parametrize(
    "how", ["set_float32_matmul_precision", "allow_tf32", "matmul.fp32_precision", "backends.fp32_precision"]
)
def test_the_kl_never_takes_tf32(how, options, restored):
    expected, expected_grad = kl_and_gradient("cpu", **options)
    allow(how)
    before = matmul.fp32_precision
    kl, grad = kl_and_gradient("cuda", **options)
    assert ((kl - expected).norm() / expected.norm()).item() < 1e-4
    assert ((grad - expected_grad).norm() / expected_grad.norm()).item() < 5e-3  # whose products may take it
    assert matmul.fp32_precision == before
    if how == "backends.fp32_precision":  # what the product inherits, it still inherits
        torch.backends.fp32_precision = "ieee"
        assert matmul.fp32_precision == "ieee"
        torch.backends.fp32_precision = "tf32"
    x = torch.randn(64, 64)
    assert ((x.cuda() @ x.cuda()).cpu() - x @ x).abs().max() > 1e-4  # others do


@gpu
@pytest.mark.parametrize("how", ["matmul.fp32_precision", "backends.fp32_precision"])
def test_low_precision_is_computed_under_the_newer_settings(how, restored):
    allow(how)
    hidden, weight = (torch.randn(4, 8, device="cuda").bfloat16() for _ in range(2))
    labels = torch.randint(4, (4,), device="cuda")
    divergence = tdpo_ext.linear_token_divergence(hidden, weight, hidden, weight, labels)
    assert not divergence.kl.any()
