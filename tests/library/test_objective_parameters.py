"""What objectives hold and what they write: parameters, tensors per pair, missing columns, changes in place."""

import functools

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from helpers.linear_cases import BUDGETS, make_case
from tdpo_ext import LinearTDPOLoss, MarginLoss, linear_preference_loss, per_token

BETA = nn.Parameter(torch.tensor(0.3))


def margin(chosen, rejected):
    return chosen.logratio - rejected.logratio


def with_beta(chosen, rejected, beta):
    return -logsigmoid(beta * margin(chosen, rejected))


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, chosen, rejected):
        return with_beta(chosen, rejected, self.scale)


def closure():
    beta = nn.Parameter(torch.tensor(0.3))
    return lambda chosen, rejected: with_beta(chosen, rejected, beta)


def derived():
    logarithm = nn.Parameter(torch.tensor(-1.0))
    beta = logarithm.exp()
    return lambda chosen, rejected: with_beta(chosen, rejected, beta)


@per_token
def on_tokens(chosen, rejected):
    return -logsigmoid(BETA * (chosen.sum(chosen.logratio) - rejected.sum(rejected.logratio)))


HOLDERS = {
    "a module": (Learned, "scale"),
    "a method": (lambda: Learned().forward, "scale"),
    "a closure": (closure, "beta"),
    "a global": (lambda: lambda chosen, rejected: with_beta(chosen, rejected, BETA), "BETA"),
    "a closed-over module": (lambda: functools.partial(lambda of, c, r: of(c, r), Learned()), "a parameter"),
    "a partial": (lambda: functools.partial(with_beta, beta=BETA), "beta"),
    "what it was made of": (derived, "a parameter"),
    "tokens": (lambda: on_tokens, "BETA"),
    "a link": (lambda: MarginLoss(margin, lambda margins: -logsigmoid(BETA * margins)), "BETA"),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_parameters_that_would_get_no_gradient_are_refused_by_name(holder):
    make, name = HOLDERS[holder]
    with pytest.raises(ValueError, match=f"objective uses {name}, a tensor of shape .* would get no gradient"):
        linear_preference_loss(make(), **make_case().tensors())


@pytest.mark.parametrize("policy_trains", [False, True])
def test_parameters_that_begin_to_train_later_are_refused(policy_trains):
    objective, tensors = Learned().requires_grad_(False), make_case().tensors()
    linear_preference_loss(objective, **tensors)
    objective.requires_grad_()
    with torch.no_grad():
        linear_preference_loss(objective, **tensors)
    for name in ("hidden", "weight"):
        tensors[name].requires_grad_(policy_trains)
    with pytest.raises(ValueError, match="objective uses scale"):
        linear_preference_loss(objective, **tensors)


def test_a_learned_number_per_token_gets_its_gradient():
    """The way that the refusal points to."""

    @per_token
    def learned(chosen, rejected):
        beta = chosen.mean(chosen.columns["beta"])
        return with_beta_of_tokens(chosen, rejected, beta)

    def with_beta_of_tokens(chosen, rejected, beta):
        return -logsigmoid(beta * (chosen.sum(chosen.logratio) - rejected.sum(rejected.logratio)))

    tensors, beta = make_case(torch.float64, ignored=0.0).tensors(), torch.tensor(0.3, dtype=torch.float64)
    beta.requires_grad_()
    column = beta.expand(tensors["labels"].shape)
    linear_preference_loss(learned, **tensors, token_columns={"beta": column})[0].backward()
    step = 1e-6

    def loss(value):
        objective = functools.partial(with_beta, beta=value)
        return linear_preference_loss(objective, **tensors)[0].item()

    slope = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
    assert beta.grad.item() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize("objective", [LinearTDPOLoss().objective, margin, Learned(), on_tokens])
def test_objectives_are_tried_in_inference_mode(objective):
    with torch.inference_mode():
        tensors = make_case().tensors()
        loss, _, _ = linear_preference_loss(objective, **tensors)
    assert loss.isfinite()


def test_tensors_per_pair_are_an_error_that_says_what_was_tried():
    offsets = torch.tensor([0.1, 0.2])
    with pytest.raises(
        RuntimeError, match=r"size of tensor a.*tried on 3 made-up pairs of 2 and 3, 3 and 4, 4 and 5 tok"
    ):
        linear_preference_loss(
            lambda chosen, rejected: margin(chosen, rejected) - offsets, **make_case(pairs=2).tensors()
        )


@pytest.mark.parametrize("given", [{}, {"mask": "labels"}])
def test_a_missing_column_is_named_with_those_there_are(given):
    @per_token
    def weighted(chosen, rejected):
        return chosen.sum(chosen.columns["weight"] * chosen.logratio) - rejected.sum(rejected.logratio)

    tensors = make_case().tensors()
    columns = {name: torch.ones(tensors[like].shape) for name, like in given.items()}
    there = "'mask'" if given else "none"
    with pytest.raises(KeyError, match=f"objective reads the column 'weight', but token_columns has {there}"):
        linear_preference_loss(weighted, **tensors, token_columns=columns)
    complete = {**columns, "weight": torch.ones(tensors["labels"].shape)}
    linear_preference_loss(weighted, **tensors, token_columns=complete)
    with pytest.raises(KeyError, match="objective reads the column 'weight'"):  # it was tried: the real pairs tell
        linear_preference_loss(weighted, **tensors, token_columns=columns)


FIELDS = ("ref_logps", "entropy", "correct", "tokens")


def writes_sums(chosen, rejected):
    loss = margin(chosen, rejected) + chosen.kl
    for side in (chosen, rejected):
        for field in FIELDS:
            getattr(side, field).data.mul_(3)
        side.kl.data.add_(5)
    return loss


@per_token
def writes_tokens(chosen, rejected):
    weight = chosen.columns["weight"]
    loss = chosen.sum(weight * chosen.logratio) - rejected.sum(rejected.logratio)
    for side in (chosen, rejected):
        for field in FIELDS:
            getattr(side, field).data.mul_(3)
        side.kl.data.add_(5)
        side.columns["weight"].data.mul_(2)
    return loss


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("objective", [writes_sums, writes_tokens])
def test_what_an_objective_writes_changes_no_metric_and_no_argument(objective, budget):
    tensors = make_case(pairs=4).tensors()
    column = torch.ones(tensors["labels"].shape)
    _, *expected = linear_preference_loss(margin, **tensors, logits_budget=BUDGETS[budget])
    columns = {"weight": column} if objective is writes_tokens else None
    loss, *sides = linear_preference_loss(objective, **tensors, logits_budget=BUDGETS[budget], token_columns=columns)
    loss.backward()
    for side, truth in zip(sides, expected):
        for field, value, of_truth in zip(side._fields, side, truth):
            assert torch.equal(value, of_truth), field
    assert (column == 1).all()
