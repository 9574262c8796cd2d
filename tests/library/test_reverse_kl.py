"""kl_direction="reverse": KL(policy || reference), from logits and from hidden states."""

import math

import pytest
import torch

from helpers.linear_cases import OBJECTIVES, kind_of, loss_and_gradients, make_case
from helpers.logit_cases import DTYPES, VOCABULARIES, assert_as_good_as_eager, random_rows
from tdpo_ext import (
    LinearTDPOLoss,
    MarginLoss,
    TokenDivergence,
    eager,
    linear_preference_loss,
    linear_token_divergence,
    token_divergence,
)

INF = math.inf
REVERSE = {"kl_direction": "reverse"}


def values_and_gradient(function, logits, ref_logits, labels, **options):
    leaf = logits.detach().requires_grad_()
    divergence = function(leaf, ref_logits, labels, **REVERSE, **options)
    weights = torch.linspace(-1, 1, labels.numel(), dtype=divergence.logps.dtype)
    (divergence.logps * weights + divergence.kl * (0.7 - weights)).sum().backward()
    return divergence.detach(), leaf.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("perturbation", [1e-3, 0.5])
def test_as_good_as_eager(dtype, vocab, perturbation):
    inputs = random_rows(4, vocab, dtype, perturbation, ignored=[2])
    check_against_eager(inputs)


@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 5.0}, {"temperature": 1.6, "softcap": 30.0}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_temperature_and_softcap(options, dtype):
    check_against_eager(random_rows(5, 507, dtype, 1.0, ignored=[0]), **options)


def check_against_eager(inputs, **options):
    logits, ref_logits, labels = inputs
    ours, grad = values_and_gradient(token_divergence, *inputs, **options)
    eager_values, eager_grad = values_and_gradient(eager.token_divergence, *inputs, **options)
    doubles = (logits.double(), ref_logits.double(), labels)
    truth, true_grad = values_and_gradient(eager.token_divergence, *doubles, **options)
    for name, *values in zip(TokenDivergence._fields, ours, eager_values, truth):
        assert_as_good_as_eager(*values, name)
    assert_as_good_as_eager(grad, eager_grad, true_grad, "gradient")


@pytest.mark.parametrize("perturbation", [1e-3, 1e-2, 1e-1, 1.0])
def test_near_equality(perturbation):
    """No worse than eager float32 anywhere, and 10 times better at 1e-3: values and gradients."""
    logits, ref_logits, labels = random_rows(16, 32_000, torch.float32, perturbation)

    def kl_and_gradient(function, dtype):
        leaf = logits.to(dtype, copy=True).requires_grad_()
        kl = function(leaf, ref_logits.to(dtype), labels, **REVERSE).kl
        return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]

    truth = kl_and_gradient(eager.token_divergence, torch.float64)
    errors = [
        [(value.double() - true).norm() / true.norm() for value, true in zip(kl_and_gradient(f, torch.float32), truth)]
        for f in (token_divergence, eager.token_divergence)
    ]
    for ours, rounded in zip(*errors):
        assert ours < rounded
        if perturbation == 1e-3:
            assert ours < rounded / 10


def test_is_the_forward_kl_of_exchanged_rows():
    logits, ref_logits, labels = random_rows(8, 5003)
    reverse = token_divergence(logits, ref_logits, labels, **REVERSE)
    forward = token_divergence(ref_logits, logits, labels)
    torch.testing.assert_close(reverse.kl, forward.kl, rtol=1e-6, atol=0)
    torch.testing.assert_close(reverse.logps, forward.ref_logps, rtol=1e-6, atol=0)
    assert (reverse.kl - token_divergence(logits, ref_logits, labels).kl).abs().min() > 1e-4


@pytest.mark.parametrize("vocab", [8, 507, 9000])
def test_edge_values(vocab):
    logits, ref_logits, labels = random_rows(5, vocab)
    labels[:] = 1
    labels[4] = -100
    logits[0, 3] = ref_logits[0, 3] = -INF  # masked in both
    logits[1, 3] = -INF  # p = 0: no part in the sum
    ref_logits[2, 3] = -INF  # q = 0 where p > 0
    logits[3, 3] = -3e4  # p underflows
    logits[4] = math.nan  # ignored
    ours = token_divergence(logits, ref_logits, labels, **REVERSE)
    truth = eager.token_divergence(logits.double(), ref_logits.double(), labels, **REVERSE)
    assert ours.kl[2] == INF
    for value, expected in zip(ours, truth):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    kept = [0, 1, 3]
    _, grad = values_and_gradient(token_divergence, logits[kept], ref_logits[kept], labels[kept])
    # Autograd of the oracle makes NaN of -inf.
    doubles = (tensor[kept].double().clamp(min=-1e4) for tensor in (logits, ref_logits))
    _, true_grad = values_and_gradient(eager.token_divergence, *doubles, labels[kept])
    torch.testing.assert_close(grad.double(), true_grad, rtol=1e-5, atol=1e-6)
    _, grad = values_and_gradient(token_divergence, logits[4:], ref_logits[4:], labels[4:])
    assert not grad.any()


def test_gradcheck():
    logits, ref_logits, labels = random_rows(3, 9, torch.float64)

    def outputs(x):
        d = token_divergence(x, ref_logits, labels, **REVERSE, temperature=0.8, softcap=4.0)
        return d.logps, d.kl

    assert torch.autograd.gradcheck(outputs, logits.requires_grad_())


def test_compiles_without_a_graph_break():
    logits, ref_logits, labels = random_rows(4, 50)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(x):
        return token_divergence(2 * x, ref_logits, labels, **REVERSE).kl.sum()

    leaf = logits.requires_grad_()
    (grad,) = torch.autograd.grad(total(leaf), leaf)
    plain = token_divergence(2 * leaf, ref_logits, labels, **REVERSE).kl.sum()
    torch.testing.assert_close(grad, torch.autograd.grad(plain, leaf)[0])


def kl_margin(chosen, rejected):
    return chosen.logratio - rejected.logratio - 0.3 * chosen.kl - 0.7 * rejected.kl


def kl_loss(chosen, rejected):
    return torch.nn.functional.softplus(-0.1 * kl_margin(chosen, rejected))


# Rows of logits that fit the budget, of pairs with some 135 rows.
ROWS = {"one chunk": 500, "several chunks": 160, "deferred": 90, "streamed": 90}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plan", ROWS)
def test_fused_losses(dtype, plan, plans):
    """A gradient of both KLs, as a MarginLoss (whole chunks or deferred) and as an ordinary objective."""
    objective = kl_loss
    if plan != "streamed":
        objective = MarginLoss(kl_margin, lambda margins: torch.nn.functional.softplus(-0.1 * margins))
    case = make_case(dtype, pairs=3, tokens=75, bias=True, ignored=0.1)
    options = {**REVERSE, "temperature": 0.9, "softcap": 6.0}
    row_bytes = 301 * (16 if dtype == torch.float64 else 10) + 800
    loss, sides, grads = loss_and_gradients(
        linear_preference_loss, case, objective, logits_budget=ROWS[plan] * row_bytes, **options
    )
    assert kind_of(plans[-1]) == plan
    truth, true_sides, true_grads = loss_and_gradients(
        eager.linear_preference_loss, case, kl_loss, dtype=torch.float64, **options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sides[1].kl.double(), true_sides[1].kl, rtol=1e-5, atol=1e-5)
    for name, grad in grads.items():
        error = (grad.double() - true_grads[name]).norm() / true_grads[name].norm()
        assert error < max(2 * torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 2e-5), name


@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_token_values(budget):
    """Distillation: the reverse KL of every token, streamed, with its gradient."""
    case = make_case(torch.float32, bias=True)
    tensors, truth = case.tensors(), case.tensors(torch.float64)
    ours = linear_token_divergence(**tensors, **REVERSE, logits_budget=budget)
    expected = eager.linear_token_divergence(**truth, **REVERSE)
    torch.testing.assert_close(ours.kl.double(), expected.kl, rtol=1e-5, atol=1e-6)
    for divergence in (ours, expected):
        divergence.kl.mean().backward()
    for name in ("hidden", "weight", "bias"):
        error = (tensors[name].grad.double() - truth[name].grad).norm() / truth[name].grad.norm()
        assert error < 1e-5, name


def test_module_and_options():
    case = make_case()
    loss, _, _ = LinearTDPOLoss(beta=0.1, **REVERSE)(**case.tensors())
    expected, _, _ = eager.linear_preference_loss(OBJECTIVES["tdpo2"], **case.tensors(), **REVERSE)
    torch.testing.assert_close(loss, expected)
    for direction in ("backward", None, 1):
        with pytest.raises(ValueError, match="kl_direction"):
            LinearTDPOLoss(kl_direction=direction)
        with pytest.raises(ValueError, match="kl_direction"):
            token_divergence(torch.zeros(1, 3), torch.zeros(1, 3), torch.tensor([1]), kl_direction=direction)
