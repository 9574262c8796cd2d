"""What objectives may not do, and when they are tried."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from helpers.linear_cases import make_case
from tdpo_ext import linear_preference_loss, per_token


def coupled_through_a_detached_value(chosen, rejected):
    margin = chosen.logratio - rejected.logratio
    return -logsigmoid(margin - margin.detach().mean())


def coupled_from_three_pairs_on(chosen, rejected):
    margin = chosen.logratio - rejected.logratio
    return -logsigmoid(margin - (margin.mean() if len(margin) > 2 else 0.0))


def coupled_from_four_pairs_on(chosen, rejected):
    margin = chosen.logratio - rejected.logratio
    return -logsigmoid(margin - (margin.detach().mean() if len(margin) > 3 else 0.0))


def coupled_by_the_length_of_all(chosen, rejected):
    margin = chosen.logratio - rejected.logratio
    return -logsigmoid(margin if chosen.tokens.sum() < 100 else margin / 2)


def coupled_through_rejected_alone(chosen, rejected):
    return chosen.logps - rejected.kl.roll(1)


def coupled_through_the_chosen_kl(chosen, rejected):
    return rejected.logps - chosen.kl.sum()


def normalised_by_the_longest(chosen, rejected):
    return (chosen.logratio - rejected.logratio) / chosen.tokens.max()


def coupled_in_the_gradient_alone(chosen, rejected):
    margin = chosen.logratio - rejected.logratio
    return -logsigmoid(margin - margin.mean() + margin.mean().detach())


@per_token
def tokens_coupled_in_the_gradient_alone(chosen, rejected):
    margin = chosen.sum(chosen.kl) - rejected.sum(rejected.logps)
    return margin - margin.mean() + margin.mean().detach()


@per_token
def coupled_through_the_next_token(chosen, rejected):
    return chosen.sum(chosen.logps.roll(1)) - rejected.sum(rejected.logps)


@pytest.mark.parametrize(
    "objective",
    [
        coupled_in_the_gradient_alone,
        tokens_coupled_in_the_gradient_alone,
        coupled_through_the_next_token,
        coupled_through_a_detached_value,
        coupled_from_three_pairs_on,
        coupled_from_four_pairs_on,
        coupled_by_the_length_of_all,
        coupled_through_rejected_alone,
        coupled_through_the_chosen_kl,
        normalised_by_the_longest,
    ],
)
def test_coupled_pairs_are_refused(objective):
    with pytest.raises(
        ValueError, match=r"couples pairs.*tried on 3 made-up pairs of 2 and 3, 3 and 4, 4 and 5 tokens"
    ):
        linear_preference_loss(objective, **make_case().tensors())


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_losses_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="for 3 made-up pairs"):
        linear_preference_loss(lambda chosen, rejected: torch.full_like(chosen.kl, value), **make_case().tensors())


class Counting:
    """An objective with state."""

    def __init__(self):
        self.pairs = []

    def __call__(self, chosen, rejected):
        self.pairs.append(len(chosen.logps))
        return -logsigmoid(chosen.logratio - rejected.logratio)

    method = __call__


class Unhashable(Counting):
    __hash__ = None

    def __eq__(self, other):
        return True


@pytest.mark.parametrize("kind", [Counting, Unhashable])
@pytest.mark.parametrize("bound", [False, True])
def test_an_objective_sees_made_up_pairs_once(kind, bound):
    state = kind()
    for _ in range(3):
        objective = state.method if bound else state
        linear_preference_loss(objective, **make_case(pairs=5).tensors())
    assert state.pairs.count(5) == 3
    assert len(state.pairs) == 3 + 5  # some pairs, three of them alone, and more pairs
    other = kind()
    linear_preference_loss(other.method if bound else other, **make_case(pairs=5).tensors())
    assert len(other.pairs) == 1 + 5


def test_an_objective_s_own_error_is_not_hidden():
    def broken(chosen, rejected):
        raise KeyError("what it says")

    with pytest.raises(KeyError, match="what it says"):
        linear_preference_loss(broken, **make_case().tensors())


def test_a_garbage_collected_objective_is_not_mistaken_for_another():
    for factor in range(50):  # memory is used again, so identities repeat
        good = Counting()
        linear_preference_loss(good, **make_case(pairs=1).tensors())
        del good

        def bad(chosen, rejected, factor=factor):
            return chosen.logratio - rejected.logratio.flip(0) * factor

        if factor:
            with pytest.raises(ValueError, match="couples pairs"):
                linear_preference_loss(bad, **make_case(pairs=2).tensors())
        del bad


def test_in_place_changes_before_backward_are_detected():
    """Streaming reads its inputs again in backward."""
    from tdpo_ext import linear_token_divergence

    for name in ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "labels"):
        tensors = make_case(bias=True).tensors()
        values = linear_token_divergence(**tensors, logits_budget=10_000)
        with torch.no_grad():
            tensors[name].add_(0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            (values.kl.sum() + values.logps.sum()).backward()


def test_an_objective_in_the_place_of_one_that_is_gone_is_tried():
    gone = Counting()
    linear_preference_loss(gone, **make_case().tensors())
    address = id(gone)
    del gone
    others = [Counting() for _ in range(1000)]
    (successor,) = [other for other in others if id(other) == address]
    linear_preference_loss(successor, **make_case().tensors())
    assert len(successor.pairs) == 1 + 5


def test_an_objective_without_a_gradient_is_refused():
    tensors = make_case().tensors()
    with pytest.raises(ValueError, match="objective returned losses without a gradient for 3 made-up pairs"):
        linear_preference_loss(lambda chosen, rejected: (chosen.logps - rejected.logps).detach(), **tensors)
