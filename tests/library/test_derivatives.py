"""Derivatives that the kernels do not have raise; none is zero or wrong in silence."""

import pytest
import torch
from torch.autograd import forward_ad

from helpers.linear_cases import BUDGETS, make_case
from helpers.logit_cases import random_rows
from tdpo_ext import linear_preference_loss, linear_token_divergence, per_token, tdpo_loss, token_divergence

LOGITS, REF_LOGITS, LABELS = random_rows(4, 9)
TENSORS = {name: tensor for name, tensor in vars(make_case(vocab=9)).items() if tensor is not None}


def logit_loss(logits):
    values = token_divergence(logits, REF_LOGITS, LABELS)
    return (values.kl + values.logps).sum()


def pair_loss(hidden, **options):
    return linear_preference_loss(tdpo_loss, **{**TENSORS, "hidden": hidden}, **options)[0]


def token_loss(hidden):
    values = linear_token_divergence(**{**TENSORS, "hidden": hidden})
    return (values.kl + values.logps).sum()


LOSSES = {
    "token_divergence": (logit_loss, LOGITS, "logits"),
    "linear_preference_loss": (pair_loss, TENSORS["hidden"], "hidden"),
    "linear_token_divergence": (token_loss, TENSORS["hidden"], "hidden"),
}
of_every_function = pytest.mark.parametrize("function", LOSSES)


@of_every_function
def test_second_derivatives_raise(function):
    loss, point, _ = LOSSES[function]
    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), torch.autograd.grad(loss(leaf), leaf)[0])
    with pytest.raises(RuntimeError, match=f"tdpo_ext: .*{function} is not supported"):
        (gradient.square().sum() + leaf.sum()).backward()


@of_every_function
def test_second_derivatives_by_the_leaves_alone_raise(function):
    """Where the engine visits only what leads to one tensor, as for a Hessian's products."""
    loss, point, _ = LOSSES[function]
    with pytest.raises(RuntimeError, match=f"tdpo_ext: .*{function} is not supported"):
        torch.autograd.functional.vhp(loss, point, torch.ones_like(point))
    leaf = point.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(2 * leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"tdpo_ext: .*{function} is not supported"):
        torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)


@pytest.mark.parametrize("name", ["weight", "bias", "column"])
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_second_derivatives_by_other_leaves_raise(name, budget):
    @per_token
    def weighted(chosen, rejected):
        w = chosen.columns["w"]
        return rejected.sum(rejected.logratio) - chosen.sum(w * w * chosen.logratio)

    tensors = make_case(bias=True).tensors()
    column = torch.ones(tensors["labels"].shape, requires_grad=True)
    loss, _, _ = linear_preference_loss(weighted, **tensors, token_columns={"w": column}, logits_budget=budget)
    leaf = column if name == "column" else tensors[name]
    (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through linear_preference_loss"):
        torch.autograd.grad(gradient.sum(), leaf, allow_unused=True)


@of_every_function
def test_derivatives_by_the_upstream_gradient_raise(function):
    loss, point, _ = LOSSES[function]
    leaf, factor = point.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(factor * loss(leaf), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=f"tdpo_ext: .*{function} is not supported"):
        torch.autograd.grad(gradient.sum(), factor)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_create_graph_alone_trains():
    for loss, point, _ in LOSSES.values():
        leaf = point.clone().requires_grad_()
        loss(leaf).backward(create_graph=True)
        assert leaf.grad.isfinite().all()
        leaf.grad = None  # the graph and the leaf hold each other


@of_every_function
@pytest.mark.parametrize("is_leaf", [False, True])
def test_forward_mode_raises(function, is_leaf):
    loss, point, argument = LOSSES[function]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{argument} has a tangent"):
        loss(forward_ad.make_dual(point.clone().requires_grad_(is_leaf), torch.ones_like(point)))


def test_forward_mode_by_the_reference_raises():
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="ref_logits has a tangent"):
        token_divergence(LOGITS, forward_ad.make_dual(REF_LOGITS, REF_LOGITS), LABELS)


@of_every_function
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev", "jacfwd", "hessian"])
def test_transforms_raise_or_are_right(function, transform):
    loss, point, _ = LOSSES[function]
    if transform == "jvp":
        with pytest.raises(RuntimeError, match=r"has a tangent|torch\.func"):
            torch.func.jvp(loss, (point,), (torch.ones_like(point),))
    elif transform == "vmap" and function == "token_divergence":
        batch = torch.stack([point, 2 * point])
        torch.testing.assert_close(torch.func.vmap(loss)(batch), torch.stack([loss(point), loss(2 * point)]))
    else:
        points = torch.stack([point]) if transform == "vmap" else point
        with pytest.raises(RuntimeError, match=r"has a tangent|functorch transforms|transforms of torch\.func"):
            getattr(torch.func, transform)(loss)(points)


def test_batched_gradients_of_logits_are_right():
    leaf = LOGITS.clone().requires_grad_()
    values = token_divergence(leaf, REF_LOGITS, LABELS)
    per_row = torch.eye(len(LABELS))
    (batched,) = torch.autograd.grad(values.kl, leaf, per_row, is_grads_batched=True, retain_graph=True)
    (summed,) = torch.autograd.grad(values.kl.sum(), leaf)
    torch.testing.assert_close(batched.sum(0), summed)
    assert (batched * (1 - per_row[..., None]) == 0).all()


@pytest.mark.parametrize("name", ["ref_logits", "labels"])
def test_logits_beside_tensors_of_inference_mode(name):
    others = {"ref_logits": REF_LOGITS, "labels": LABELS}
    with torch.inference_mode():
        made = others[name].clone()
    grads = []
    for given in (others, {**others, name: made}):
        leaf = LOGITS.clone().requires_grad_()
        grads.append(torch.autograd.grad(token_divergence(leaf, **given).kl.sum(), leaf)[0])
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", ["ref_hidden", "ref_weight", "labels"])
def test_hidden_states_beside_tensors_of_inference_mode(name):
    with torch.inference_mode():
        made = TENSORS[name].clone()
    grads = []
    for given in (TENSORS, {**TENSORS, name: made}):
        leaf = TENSORS["hidden"].clone().requires_grad_()
        values = linear_token_divergence(**{**given, "hidden": leaf}, logits_budget=2_000)
        grads.append(torch.autograd.grad(values.kl.sum(), leaf)[0])
    assert torch.equal(*grads)
