"""The fused losses against the float64 oracle, in values and every gradient, whatever the plan."""

import copy
import dataclasses
import functools
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tdpo_ext.fused.planning.plan
from helpers.linear_cases import (
    BUDGETS,
    OBJECTIVES,
    ipo_loss,
    kind_of,
    loss_and_gradients,
    make_case,
    not_a_margin_loss,
)
from tdpo_ext import LinearTDPOLoss, eager, linear_preference_loss, linear_token_divergence, tdpo_loss
from tdpo_ext.fused.planning.choose import make_plan
from tdpo_ext.fused.planning.plan import ChunkedPlan
from tdpo_ext.fused.planning.sizes import Sizes


def assert_matches_oracle(case, objective, **options):
    """Within 2x of same-dtype eager's own error, or of the rounding of dz to a low precision."""
    budget = options.pop("logits_budget", None)
    loss, sides, grads = loss_and_gradients(linear_preference_loss, case, objective, logits_budget=budget, **options)
    oracle = eager.linear_preference_loss
    true_loss, true_sides, true_grads = loss_and_gradients(oracle, case, objective, dtype=torch.float64, **options)
    double = case.hidden.dtype == torch.float64
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-12 if double else 1e-5, atol=1e-12 if double else 1e-5)
    for side, true_side in zip(sides, true_sides):
        assert not side.kl.requires_grad
        for value, expected in zip(side, true_side):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    rounding = torch.finfo(case.hidden.dtype).eps
    for name, grad in grads.items():
        assert grad.dtype == case.hidden.dtype
        error = (grad.double() - true_grads[name]).norm() / true_grads[name].norm().clamp(min=1e-2)
        assert error < max(2 * rounding, 2e-5 if not double else 1e-12), f"{name}: relative error {error:.2e}"


pytestmark = pytest.mark.usefixtures("large_calls")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("objective", ["tdpo2", "tdpo1"])
def test_gradients(dtype, budget, objective):
    assert_matches_oracle(make_case(dtype, bias=True), OBJECTIVES[objective], logits_budget=BUDGETS[budget])


@pytest.mark.parametrize("width", [16, 64])
def test_low_precision_weight_gradients_of_several_chunks(width):
    """One product over the kept dz of all rows."""
    case = make_case(torch.bfloat16, width=width, bias=True)
    lengths = [int((case.labels[[pair, pair + 3]] != -100).sum()) for pair in range(3)]
    sizes = Sizes(vocab=301, width=width, ref_width=24, weight_bytes=2, logit_bytes=4, needs_weight_grad=True)
    plan = make_plan(lengths, sizes, 90_000)
    assert isinstance(plan, ChunkedPlan)
    assert plan.keeps_dz
    assert not plan.sums_weight
    assert len(plan.chunks) > 1
    assert_matches_oracle(case, OBJECTIVES["tdpo2"], logits_budget=90_000)


@pytest.mark.parametrize("plan", ["chunked", "streaming"])
def test_low_precision_weight_gradients_are_summed_in_float32(plan, plans, monkeypatch):
    """The error of dW over many chunks, or blocks of rows, is that of one: a single rounding, not one per sum."""
    case = make_case(torch.bfloat16, pairs=40, tokens=12, width=16, vocab=401, ignored=0.0)
    objective = OBJECTIVES["tdpo2"] if plan == "chunked" else not_a_margin_loss
    monkeypatch.setattr(tdpo_ext.fused.planning.choose, "STREAMING_ROWS", 32)
    errors = []
    truth = loss_and_gradients(eager.linear_preference_loss, case, objective, dtype=torch.float64)[2]["weight"]
    for budget in (1 << 30, 180_000 if plan == "chunked" else 60_000):
        grad = loss_and_gradients(linear_preference_loss, case, objective, logits_budget=budget)[2]["weight"]
        errors.append(((grad.double() - truth).norm() / truth.norm()).item())
    if plan == "chunked":
        assert len(plans[-1].chunks) >= 16
        assert plans[-1].sums_weight
        assert plans[-1].steps.gradient_products >= 8
    else:
        assert not isinstance(plans[-1], ChunkedPlan)
        assert plans[-1].rows == 32
    assert errors[1] < 1.15 * errors[0]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("budget", ["one chunk", "streamed"])
def test_objectives(objective, budget):
    assert_matches_oracle(make_case(), OBJECTIVES[objective], logits_budget=BUDGETS[budget])


@pytest.mark.parametrize("budget", ["one chunk", "several chunks", "streamed"])
@pytest.mark.parametrize("options", [{"temperature": 0.7}, {"softcap": 3.0}, {"temperature": 1.3, "softcap": 5.0}])
def test_temperature_and_softcap(budget, options):
    assert_matches_oracle(make_case(bias=True), OBJECTIVES["tdpo2"], logits_budget=BUDGETS[budget], **options)


@pytest.mark.parametrize(("plan", "budget"), [("one chunk", 1 << 30), ("streamed", 1)])
@pytest.mark.parametrize(
    "shape",
    [{"pairs": 1}, {"pairs": 1, "tokens": 1, "ignored": 0.0}, {"vocab": 1}, {"vocab": 5, "width": 3, "ref_width": 1}],
)
def test_small_shapes(plan, budget, shape, plans):
    assert_matches_oracle(make_case(**shape), OBJECTIVES["tdpo2"], logits_budget=budget)
    assert kind_of(plans[-1]) == plan


def test_any_shape(plans):
    """A third of all rows fits the budget, as many rows as the longest pair has, more, or hardly any."""

    @given(
        pairs=st.sampled_from([1, 3, 4]),
        tokens=st.integers(1, 9),
        width=st.integers(1, 20),
        ref_width=st.integers(1, 20),
        vocab=st.integers(1, 400),
        ignored=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
        rows=st.sampled_from([0.01, 0.4, 0.7, 1.1]),
        bias=st.booleans(),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
        seed=st.integers(0, 1 << 30),
    )
    def check(pairs, tokens, width, ref_width, vocab, ignored, rows, bias, dtype, seed):
        torch.manual_seed(seed)
        case = make_case(dtype, pairs, tokens, width, ref_width, vocab, bias, ignored)
        row_bytes = vocab * (8 if dtype == torch.float32 else 10) + dtype.itemsize * (2 * width + ref_width) + 128
        weight_sum = 2 * vocab * width if dtype == torch.bfloat16 else 0
        budget = 1 + int(rows * ((case.labels != -100).sum() * row_bytes + weight_sum))
        assert_gradients_of_any_shape(case, budget)

    check()
    met = Counter(kind_of(plan) for plan in plans)
    assert all(met[kind] >= 5 for kind in ("one chunk", "several chunks", "streamed")), met


def assert_gradients_of_any_shape(case, budget):
    objective, dtype = OBJECTIVES["tdpo1"], case.hidden.dtype
    loss, _, grads = loss_and_gradients(linear_preference_loss, case, objective, logits_budget=budget)
    true_loss, _, true_grads = loss_and_gradients(eager.linear_preference_loss, case, objective, dtype=torch.float64)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-3, atol=1e-3)
    tolerance = 0.03 if dtype == torch.bfloat16 else 1e-3
    for name, grad in grads.items():
        # Rows may cancel in a sum, but the rounding of each to bfloat16 does not.
        atol = tolerance * (0.3 if dtype == torch.bfloat16 else 1e-2) + tolerance * true_grads[name].abs().max().item()
        torch.testing.assert_close(grad.double(), true_grads[name], rtol=tolerance, atol=atol)


def assert_no_rows(loss, sides, grads):
    assert loss.item() == pytest.approx(0.6931472)
    assert not any(value.any() for side in sides for value in side)
    assert not any(grad.any() for grad in grads.values())


def test_nothing_but_ignored_rows(plans):
    case = make_case(ignored=1.1)
    assert_no_rows(*loss_and_gradients(linear_preference_loss, case, OBJECTIVES["tdpo2"], logits_budget=1))
    assert kind_of(plans[-1]) == "one chunk"  # no rows fit any budget
    tensors = case.tensors()
    values = linear_token_divergence(**tensors, logits_budget=1)
    (values.logps.sum() + values.kl.sum()).backward()
    assert not any(value.any() for value in values)
    assert not tensors["hidden"].grad.any()
    assert not tensors["weight"].grad.any()


@pytest.mark.parametrize(
    ("plan", "budget"), [("one chunk", 1 << 30), ("several chunks", 500_000), ("deferred", 300_000), ("streamed", 1)]
)
def test_nothing_but_ignored_rows_of_known_lengths(plan, budget, plans):
    """None of these rows is dropped before the heads."""
    case = make_case(pairs=3, tokens=75, ignored=1.1)
    flat = {name: getattr(case, name).flatten(0, 1) for name in ("hidden", "ref_hidden", "labels")}
    options = {"row_lengths": [75] * 6, "logits_budget": budget}
    packed = dataclasses.replace(case, **flat)
    assert_no_rows(*loss_and_gradients(linear_preference_loss, packed, OBJECTIVES["tdpo2"], **options))
    assert kind_of(plans[-1]) == plan


def test_ignored_rows_never_reach_the_head():
    case = make_case()
    poisoned = copy.deepcopy(case)
    poisoned.hidden[case.labels == -100] = torch.nan
    poisoned.ref_hidden[case.labels == -100] = torch.inf
    for budget in (BUDGETS["one chunk"], BUDGETS["streamed"]):
        loss, _, grads = loss_and_gradients(linear_preference_loss, case, ipo_loss, logits_budget=budget)
        other, _, other_grads = loss_and_gradients(linear_preference_loss, poisoned, ipo_loss, logits_budget=budget)
        assert torch.equal(loss, other)
        for name, grad in grads.items():
            assert torch.equal(grad, other_grads[name]), name


def coupled(chosen, rejected):
    margin = chosen.logratio - rejected.logratio
    return -torch.nn.functional.logsigmoid(margin - margin.mean())


def only_the_next(chosen, rejected):
    return (chosen.logratio - rejected.logratio).roll(1)


@pytest.mark.parametrize("objective", [coupled, only_the_next])
def test_coupled_pairs_are_refused(objective):
    with pytest.raises(ValueError, match="couples pairs"):
        linear_preference_loss(objective, **make_case().tensors())


def test_objective_of_the_wrong_shape():
    with pytest.raises(ValueError, match="objective"):
        linear_preference_loss(lambda chosen, rejected: chosen.logps.sum(), **make_case().tensors())


BAD_CALLS = {
    "weight": (lambda a: a["weight"][:, :-1], ValueError),
    "ref_weight": (lambda a: a["ref_weight"][:-1], ValueError),
    "ref_hidden": (lambda a: a["ref_hidden"].double(), TypeError),
    "hidden": (lambda a: a["hidden"].detach().int(), TypeError),
    "labels": (lambda a: a["labels"].int(), TypeError),
    "bias": (lambda a: torch.zeros(5), ValueError),
    "logits_budget": (lambda a: 0, ValueError),
    "temperature": (lambda a: -1.0, ValueError),
    "cu_seqlens": (lambda a: torch.tensor([0, 3]), ValueError),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_names_the_argument(name):
    change, error = BAD_CALLS[name]
    tensors = make_case().tensors()
    with pytest.raises(error, match=name):
        linear_preference_loss(ipo_loss, **{**tensors, name: change(tensors)})


def test_odd_number_of_sequences():
    tensors = make_case().tensors()
    three = {
        name: value[:3] if name in ("hidden", "ref_hidden", "labels") else value for name, value in tensors.items()
    }
    with pytest.raises(ValueError, match="even"):
        linear_preference_loss(ipo_loss, **three)


@pytest.mark.parametrize("budget", [1 << 30, 3000, 50])
def test_label_out_of_range(budget):
    tensors = make_case().tensors()
    tensors["labels"][0, 0] = 301
    with pytest.raises(IndexError, match="labels"):
        linear_preference_loss(ipo_loss, **tensors, logits_budget=budget)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [1 << 30, 20_000])
def test_token_values(dtype, budget):
    case = make_case(dtype, bias=True)
    tensors, truth = case.tensors(), case.tensors(torch.float64)
    ours = linear_token_divergence(**tensors, logits_budget=budget)
    expected = eager.linear_token_divergence(**truth)
    weights = torch.randn(6, 11, dtype=torch.float64)
    for value, wanted in zip(ours, expected):
        torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    assert not ours.entropy.requires_grad
    for divergence in (ours, expected):
        (divergence.logps * weights + divergence.kl * weights.abs()).sum().backward()
    for name in ("hidden", "weight", "bias"):
        error = (tensors[name].grad.double() - truth[name].grad).norm() / truth[name].grad.norm()
        assert error < max(2 * torch.finfo(dtype).eps, 1e-12 if dtype == torch.float64 else 1e-6)


def test_gradcheck():
    case = make_case(torch.float64, pairs=1, tokens=3, width=4, ref_width=3, vocab=7)

    def outputs(hidden, weight):
        d = linear_token_divergence(hidden, weight, case.ref_hidden, case.ref_weight, case.labels, logits_budget=200)
        return d.logps, d.kl

    leaves = (case.hidden.requires_grad_(), case.weight.requires_grad_())
    assert torch.autograd.gradcheck(outputs, leaves)


def test_signal_near_equality():
    """bf16 inputs, the reference perturbed by 1e-2: errors against float64 on the same inputs."""
    width, vocab = 256, 8000
    hidden = torch.randn(2, 16, width).bfloat16()
    weight = (torch.randn(vocab, width) / width**0.5).bfloat16()
    ref_hidden = (hidden.float() + 1e-2 * torch.randn(2, 16, width)).bfloat16()
    labels = torch.randint(vocab, (2, 16))
    inputs = (hidden, weight, ref_hidden, weight, labels)

    def kl_and_gradient(function, dtype):
        leaf = hidden.to(dtype).requires_grad_()
        kl = function(leaf, *(t.to(dtype) if t.is_floating_point() else t for t in inputs[1:])).kl
        return kl.detach(), torch.autograd.grad(kl.sum(), leaf)[0]

    truth = kl_and_gradient(eager.linear_token_divergence, torch.float64)
    rounded = kl_and_gradient(eager.linear_token_divergence, torch.bfloat16)
    ours = kl_and_gradient(linear_token_divergence, torch.bfloat16)
    errors = [[(a.double() - b).norm() / b.norm() for a, b in zip(found, truth)] for found in (ours, rounded)]
    assert errors[0][0] < errors[1][0] / 100
    assert errors[0][1] < errors[1][1] / 10


def test_module():
    case = make_case()
    module = LinearTDPOLoss(beta=0.2, alpha=0.3, variant="tdpo1", temperature=0.9)
    loss, _, _ = module(**case.tensors())
    expected, _, _ = eager.linear_preference_loss(
        functools.partial(tdpo_loss, beta=0.2, alpha=0.3, variant="tdpo1"), **case.tensors(), temperature=0.9
    )
    torch.testing.assert_close(loss, expected)
    for options in ({"beta": 0}, {"alpha": -1}, {"variant": "x"}, {"temperature": 0}, {"softcap": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            LinearTDPOLoss(**options)


@pytest.mark.parametrize(("plan", "budget"), [("one chunk", 1 << 30), ("several chunks", 8000), ("streamed", 3000)])
def test_correct_and_counted_tokens(plan, budget, plans):
    case = make_case(vocab=5)
    _, chosen, rejected = linear_preference_loss(OBJECTIVES["tdpo2"], **case.tensors(), logits_budget=budget)
    assert kind_of(plans[-1]) == plan
    right = ((case.hidden @ case.weight.T).argmax(-1) == case.labels).sum(-1)
    assert torch.cat([chosen.correct, rejected.correct]).tolist() == right.tolist()
    assert right.sum() > 5
    assert torch.cat([chosen.tokens, rejected.tokens]).tolist() == (case.labels != -100).sum(-1).tolist()


@pytest.mark.parametrize("layout", ["padded", "cu_seqlens", "row_lengths"])
def test_module_hands_everything_on(layout, plans):
    """Each option away from its default, and each changes the loss or the plan."""
    case, lengths = make_case(bias=True), [11, 4, 7, 9, 11, 24]
    case.labels[0, 3], case.labels[1, 2] = 7, 7
    options = {
        "ignore_index": 7,
        "temperature": 0.9,
        "softcap": 6.0,
        "logit_scale": 0.8,
        "ref_logit_scale": 0.7,
        "kl_direction": "reverse",
        "logits_budget": 120_000,
    }
    case.labels[case.labels == -100] = 5
    arguments = {name: tensor.detach() for name, tensor in case.tensors().items()}
    if layout != "padded":
        for name in ("hidden", "ref_hidden", "labels"):
            arguments[name] = arguments[name].flatten(0, 1)
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        arguments[layout] = lengths if layout == "row_lengths" else offsets
    objective = {"beta": 0.2, "alpha": 0.3, "variant": "tdpo1"}
    expected = linear_preference_loss(functools.partial(tdpo_loss, **objective), **arguments, **options)
    ours = LinearTDPOLoss(**objective, **options)(**arguments)
    torch.testing.assert_close(ours, expected)
    assert plans[0] == plans[1]
    assert kind_of(plans[0]) == "several chunks"
    for name in [*options, *objective]:
        fewer = {key: value for key, value in {**objective, **options}.items() if key not in (name, "logits_budget")}
        other = LinearTDPOLoss(**fewer)(**arguments)
        assert name in ("logits_budget", "alpha") or not torch.allclose(other[0], ours[0], rtol=1e-4)
    assert plans[-1].budget != 120_000


@pytest.mark.parametrize("budget", BUDGETS)
def test_length_normalised_objective(budget):
    """Lengths come with the sums, so that the loss does not depend on how pairs are cut into chunks."""

    def mean_logratio_loss(chosen, rejected):
        means = [side.logratio / side.tokens.clamp(min=1) for side in (chosen, rejected)]
        return -torch.nn.functional.logsigmoid(means[0] - means[1])

    assert_matches_oracle(make_case(), mean_logratio_loss, logits_budget=BUDGETS[budget])
