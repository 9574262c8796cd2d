"""Losses of sequences alone: unpaired ones, and distillation with either KL, against float64 in every plan."""

import pytest
import torch
import torch.distributed as dist

from helpers.distributed import run_on_ranks
from helpers.linear_cases import Case, kind_of, loss_and_gradients, make_case
from tdpo_ext import MarginLoss, TokenRows, VocabShard, dpo_loss, eager, linear_token_loss, per_token

pytestmark = pytest.mark.usefixtures("large_calls")


def desirable(values):
    """KTO's term of a desirable response, against a constant: no MarginLoss."""
    return 1 - torch.sigmoid(0.1 * values.logratio - 0.2)


def everything(values):
    """No MarginLoss, with gradients of both."""
    return (0.01 * values.logps + 0.1 * values.kl) ** 2


OBJECTIVES = {
    "kl": MarginLoss(lambda values: values.kl, lambda margin: margin),
    "kl beside log-probabilities": MarginLoss(lambda values: values.kl - 0.1 * values.logps, lambda margin: margin),
    "desirable": desirable,
    "desirable as a margin": MarginLoss(
        lambda values: values.logratio, lambda margin: 1 - torch.sigmoid(0.1 * margin - 0.2)
    ),
    "everything": everything,
}
BUDGETS = {"one chunk": 1 << 30, "several chunks": 700_000, "deferred": 230_000, "streamed": 230_000}


def make_sequences(dtype=torch.float32, sequences=5, tokens=150):
    """An odd number of sequences."""
    case = make_case(dtype, pairs=1, tokens=sequences * tokens, bias=True)
    values = {name: value for name, value in vars(case).items() if value is not None}
    rows = {name: values[name][0].unflatten(0, (sequences, tokens)) for name in ("hidden", "ref_hidden", "labels")}
    return Case(**{**values, **rows})


def assert_close(grads, expected, dtype):
    tolerance = 1e-11 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    for name, grad in grads.items():
        error = (grad.double() - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl_direction", ["forward", "reverse"])
@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_equals_the_oracle_in_every_plan(objective, kind, kl_direction, dtype, plans):
    function = OBJECTIVES[objective]
    if isinstance(function, MarginLoss) == (kind == "streamed") and kind in ("streamed", "deferred"):
        pytest.skip("margin losses are deferred where others are streamed")
    case = make_sequences(dtype)
    budget = BUDGETS[kind] * (2 if dtype == torch.float64 else 1)
    options = {"kl_direction": kl_direction, "temperature": 1.3}
    loss, sums, grads = loss_and_gradients(of_pair(linear_token_loss), case, function, logits_budget=budget, **options)
    assert kind_of(plans[-1]) == kind
    truth, true_sums, true_grads = loss_and_gradients(
        of_pair(eager.linear_token_loss), case, function, dtype=torch.float64, **options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)
    for value, expected in zip(sums[0], true_sums[0]):
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(grads, true_grads, dtype)


def of_pair(function):
    """Returns its sums twice, as the helpers of pairs expect."""

    def called(*arguments, **options):
        loss, sums = function(*arguments, **options)
        return loss, sums, sums

    return called


@per_token
def mean_weighted_kl(rows):
    assert isinstance(rows, TokenRows)
    return rows.mean(rows.columns["weight"] * rows.kl)


@pytest.mark.parametrize("objective", [mean_weighted_kl, MarginLoss(mean_weighted_kl, lambda mean: mean)])
@pytest.mark.parametrize("budget", [1 << 30, 1_460_000, 400_000])
def test_a_mean_over_tokens_of_which_each_has_a_weight(objective, budget):
    case = make_sequences(torch.float64)
    tensors, weight = case.tensors(), torch.rand(case.labels.shape, dtype=torch.float64, requires_grad=True)
    loss, _ = linear_token_loss(objective, **tensors, token_columns={"weight": weight}, logits_budget=budget)
    leaves = (tensors["hidden"], tensors["weight"], weight)
    grads = torch.autograd.grad(loss, leaves)
    values = eager.linear_token_divergence(**tensors)
    expected = ((weight * values.kl).sum(-1) / values.tokens.sum(-1)).mean()
    torch.testing.assert_close(loss, expected)
    for grad, true in zip(grads, torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(grad, true)


@pytest.mark.parametrize("budget", [1 << 30, 1_460_000, 400_000])
def test_layouts_are_equal(budget):
    case = make_sequences(torch.float64)
    function = OBJECTIVES["kl beside log-probabilities"]
    counts = case.labels != -100
    lengths = counts.sum(1).tolist()
    heads = {name: getattr(case, name) for name in ("weight", "ref_weight", "bias", "ref_bias")}
    packed = {name: getattr(case, name)[counts] for name in ("hidden", "ref_hidden", "labels")}
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    padded, sums = linear_token_loss(function, **vars(case), logits_budget=budget)
    for layout in ({"cu_seqlens": offsets}, {"row_lengths": lengths}):
        loss, packed_sums = linear_token_loss(function, **packed, **heads, **layout, logits_budget=budget)
        torch.testing.assert_close(loss, padded)
        for value, expected in zip(packed_sums, sums):
            torch.testing.assert_close(value, expected)


def sharded(rank, world, device):
    case = make_sequences(torch.float64)
    middle = 120
    columns = slice(0, middle) if rank == 0 else slice(middle, None)
    shard = VocabShard(*((0, middle) if rank == 0 else (middle, case.weight.shape[0])), dist.group.WORLD)
    part = case.of_columns(columns)
    for kind, function in {"one chunk": everything, "deferred": OBJECTIVES["kl"], "streamed": everything}.items():
        budget = BUDGETS[kind]
        loss, _, grads = loss_and_gradients(
            of_pair(linear_token_loss), part, function, logits_budget=budget, shard=shard
        )
        whole, _, true_grads = loss_and_gradients(of_pair(eager.linear_token_loss), case, function)
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(grads["hidden"], true_grads["hidden"])
        torch.testing.assert_close(grads["weight"], true_grads["weight"][columns])


def test_a_sharded_vocabulary(tmp_path):
    outcomes = run_on_ranks({"sharded": sharded}, 2, "cpu", tmp_path)
    assert not any(outcomes.values()), outcomes


def coupled(values):
    return values.kl - values.kl.mean()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (coupled, "objective couples sequences: the loss of one sequence depends on"),
        (dpo_loss, r"was tried on 3 made-up sequences of 2, 3, 4 tokens"),
        (lambda values: values.kl.mean(), r"a loss per sequence is needed, \(3,\)"),
        (MarginLoss(lambda values: values.kl**2, lambda margin: margin), "margin that is not linear"),
    ],
)
def test_what_an_objective_must_not_be(objective, message):
    with pytest.raises((ValueError, TypeError), match=message):
        linear_token_loss(objective, **vars(make_sequences()))


def test_an_objective_of_pairs_and_of_sequences_is_tried_as_both():
    case = make_sequences(sequences=4)

    def any_number(*sides):
        return sum(side.kl for side in sides)

    linear_token_loss(any_number, **vars(case))
    calls = []

    def one_side(*sides):
        calls.append(len(sides))
        assert len(sides) == 1
        return sides[0].kl

    linear_token_loss(one_side, **vars(case))
    assert set(calls) == {1}


@pytest.mark.parametrize(
    ("flat", "options", "message"),
    [
        (("hidden", "ref_hidden", "labels"), {}, r"\(B, T\) is needed, or cu_seqlens"),
        ((), {"row_lengths": [1, 2]}, "row_lengths has the sum 3"),
    ],
)
def test_layouts_are_checked(flat, options, message):
    given = {**vars(make_sequences()), **options}
    given |= {name: given[name].flatten(0, 1) for name in flat}
    with pytest.raises(ValueError, match=message):
        linear_token_loss(OBJECTIVES["kl"], **given)


def test_the_gradients_of_a_call_are_handed_over_once():
    tensors = make_sequences().tensors()
    loss, _ = linear_token_loss(OBJECTIVES["kl"], **tensors)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients of this linear_token_loss were handed over"):
        loss.backward()
