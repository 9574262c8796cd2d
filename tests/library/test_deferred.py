"""The deferred plan: margin losses of pairs of any length without recompute, equal to the other plans."""

import functools
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tdpo_ext.fused.weight_gradient
from helpers.linear_cases import OBJECTIVES, Case, kind_of, loss_and_gradients, make_case, not_a_margin_loss
from tdpo_ext import MarginLoss, dpo_loss, eager, linear_preference_loss, per_token
from tdpo_ext.fused.planning.plan import ChunkedPlan, StreamingPlan
from tdpo_ext.ops.matmul import product

pytestmark = pytest.mark.usefixtures("large_calls")


def logratio_margin(chosen, rejected):
    return chosen.logratio - rejected.logratio


MARGIN_LOSSES = {
    "tdpo2": OBJECTIVES["tdpo2"],
    "tdpo1": OBJECTIVES["tdpo1"],
    "smoothed dpo": functools.partial(dpo_loss, beta=0.1, label_smoothing=0.2),
    "ipo": MarginLoss(logratio_margin, lambda margin: (margin - 2.0) ** 2),
    "hinge": MarginLoss(logratio_margin, lambda margin: (1.0 - 0.05 * margin).relu()),
    "mean": MarginLoss(
        lambda chosen, rejected: chosen.logratio / chosen.tokens - rejected.logratio / rejected.tokens,
        lambda margin: -torch.nn.functional.logsigmoid(margin),
    ),
}


def assert_gradients_match(grads, true_grads, tolerance):
    for name, grad in grads.items():
        error = (grad.double() - true_grads[name]).norm() / true_grads[name].norm().clamp(min=1e-2)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("objective", MARGIN_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("pairs", [1, 3])
def test_equals_the_oracle(objective, dtype, pairs, plans):
    case = make_case(dtype, pairs=pairs, tokens=150, bias=True)
    options = {"temperature": 1.3, "softcap": 4.0}
    function = MARGIN_LOSSES[objective]
    loss, sides, grads = loss_and_gradients(linear_preference_loss, case, function, logits_budget=500_000, **options)
    assert plans[-1].deferred
    truth, true_sides, true_grads = loss_and_gradients(
        eager.linear_preference_loss, case, function, dtype=torch.float64, **options
    )
    torch.testing.assert_close(loss.double(), truth, rtol=1e-4, atol=1e-5)  # ipo squares a sum over 150 tokens
    for side, true_side in zip(sides, true_sides):
        for value, expected in zip(side, true_side):
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert_gradients_match(grads, true_grads, 1e-11 if dtype == torch.float64 else 2 * torch.finfo(dtype).eps)


def test_the_three_plans_agree(plans):
    case = make_case(torch.float64, pairs=2, tokens=200, ignored=0.1)
    near = Case(**{**vars(case), "ref_hidden": case.hidden + 1e-3 * torch.randn(case.hidden.shape).double()})
    near.ref_weight = near.weight

    found = [
        loss_and_gradients(linear_preference_loss, near, objective, logits_budget=budget)
        for objective, budget in (
            (OBJECTIVES["tdpo2"], 1 << 30),
            (OBJECTIVES["tdpo2"], 500_000),
            (not_a_margin_loss, 500_000),
        )
    ]
    assert [type(plan) for plan in plans] == [ChunkedPlan, ChunkedPlan, StreamingPlan]
    assert [plan.deferred for plan in plans[:2]] == [False, True]
    (loss, sides, grads), *others = found
    for other_loss, other_sides, other_grads in others:
        torch.testing.assert_close(other_loss, loss, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(other_sides[1].kl, sides[1].kl, rtol=1e-9, atol=1e-12)
        assert_gradients_match(other_grads, grads, 1e-9)


def test_ignored_rows_of_known_lengths_do_not_count(plans):
    """The host drops none of these rows; a margin that divides by `tokens` must not count them."""
    case = make_case(torch.float64, pairs=2, tokens=200, ignored=0.3)
    flat = {name: getattr(case, name).flatten(0, 1) for name in ("hidden", "ref_hidden", "labels")}
    packed = Case(**{**vars(case), **flat})
    loss, _, grads = loss_and_gradients(
        linear_preference_loss, packed, MARGIN_LOSSES["mean"], row_lengths=[200] * 4, logits_budget=500_000
    )
    assert plans[-1].deferred
    truth, _, true_grads = loss_and_gradients(eager.linear_preference_loss, case, MARGIN_LOSSES["mean"])
    torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-12)
    assert_gradients_match(grads, {**true_grads, "hidden": true_grads["hidden"].flatten(0, 1)}, 1e-10)


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_frozen_tensors(frozen, plans):
    case = make_case(pairs=2, tokens=150)
    results = []
    for budget in (1 << 30, 300_000):
        tensors = case.tensors()
        tensors[frozen].requires_grad_(False)
        linear_preference_loss(OBJECTIVES["tdpo1"], **tensors, logits_budget=budget)[0].backward()
        results.append(tensors["hidden" if frozen == "weight" else "weight"].grad)
    assert [plan.deferred for plan in plans] == [False, True]
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-6)


def test_without_gradients_nothing_is_recomputed_by_either_plan(plans):
    """Under no_grad the streaming plan takes its first pass alone; where leaves need no gradient, blocks go forward."""
    case = make_case(pairs=2, tokens=150)
    with torch.no_grad():
        loss, _, _ = linear_preference_loss(OBJECTIVES["tdpo2"], **case.tensors())
        streamed, _, _ = linear_preference_loss(not_a_margin_loss, **case.tensors(), logits_budget=300_000)
    frozen = {name: tensor if tensor is None else tensor.detach() for name, tensor in case.tensors().items()}
    blocks, _, _ = linear_preference_loss(OBJECTIVES["tdpo2"], **frozen, logits_budget=300_000)
    assert [type(plan) for plan in plans] == [ChunkedPlan, StreamingPlan, ChunkedPlan]
    assert plans[-1].deferred
    torch.testing.assert_close(streamed, loss)
    torch.testing.assert_close(blocks, loss)


# (width, budget, pairs): dz of a pair is kept until its factor is known; its dW is summed apart, or alone in dW.
WAYS = {"kept": (300, 700_000, 3), "apart": (16, 200_000, 3), "alone": (16, 200_000, 1)}


def way_of(plan):
    """Of WAYS, by which a deferred plan of a trained head waits for the factors of its pairs."""
    if plan.weight_apart:
        return "apart"
    return "alone" if len(plan.chunks) == 1 and plan.steps.gradient_products > 1 else "kept"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"kl_direction": "reverse"}, {"softcap": 4.0, "temperature": 1.3, "logit_scale": 0.5, "ref_logit_scale": 0.7}],
    ids=["forward", "reverse", "scales"],
)
def test_every_way_to_wait_for_the_factor_equals_the_oracle(way, dtype, options, plans):
    width, budget, pairs = WAYS[way]
    case = make_case(dtype, pairs=pairs, tokens=150, width=width, bias=True, ignored=0.1)
    objective = MARGIN_LOSSES["smoothed dpo" if options else "tdpo1"]
    _, sides, grads = loss_and_gradients(linear_preference_loss, case, objective, logits_budget=budget, **options)
    assert plans[-1].deferred
    assert way_of(plans[-1]) == way
    _, true_sides, true_grads = loss_and_gradients(
        eager.linear_preference_loss, case, objective, dtype=torch.float64, **options
    )
    torch.testing.assert_close(sides[0].kl.double(), true_sides[0].kl, rtol=1e-4, atol=1e-5)
    assert_gradients_match(grads, true_grads, 1e-4 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("way", WAYS)
def test_token_weights_of_packed_rows(way, plans):
    """Weights of 0 among them, and pairs of which one fits a block whole."""
    width, budget, pairs = WAYS[way]
    lengths = [150, 9, 130, 140, 12, 150][: 2 * pairs] if pairs > 1 else [150, 140]
    case = make_case(torch.float64, pairs=1, tokens=sum(lengths) // 2 + 1, width=width, ignored=0.0)
    rows = sum(lengths)
    flat = {name: getattr(case, name).flatten(0, 1)[:rows] for name in ("hidden", "ref_hidden", "labels")}
    packed = Case(**{**vars(case), **flat})
    weights = torch.rand(rows, dtype=torch.float64) * (torch.rand(rows) < 0.7)

    @per_token
    def margin(chosen, rejected):
        w, l = chosen.columns["weight"], rejected.columns["weight"]
        return chosen.sum(w * chosen.logratio) - rejected.mean(l * (rejected.logratio + 0.5 * rejected.kl))

    objective = MarginLoss(margin, lambda margins: torch.nn.functional.softplus(-0.1 * margins))
    options = {"row_lengths": lengths, "token_columns": {"weight": weights}}
    loss, _, grads = loss_and_gradients(linear_preference_loss, packed, objective, logits_budget=2 * budget, **options)
    assert plans[-1].deferred
    whole_loss, _, whole = loss_and_gradients(linear_preference_loss, packed, objective, **options)
    assert not plans[-1].deferred
    torch.testing.assert_close(loss, whole_loss, rtol=1e-12, atol=1e-12)
    assert_gradients_match(grads, whole, 1e-11)


def test_a_block_without_a_gradient_between_others(plans):
    """What is kept of a pair then has a gap, though no block lost some of its rows only."""
    width, budget, _ = WAYS["kept"]
    case = make_case(torch.float64, pairs=1, tokens=150, width=width, ignored=0.0)

    @per_token
    def margin(chosen, rejected):
        return chosen.sum(chosen.columns["weight"] * chosen.logratio) - rejected.sum(rejected.logratio)

    objective, weights = MarginLoss(margin, torch.nn.functional.softplus), torch.ones(2, 150, dtype=torch.float64)
    for _ in range(2):  # the second time without the second block
        results = [
            loss_and_gradients(
                linear_preference_loss, case, objective, logits_budget=size, token_columns={"weight": weights}
            )
            for size in (budget, 1 << 30)
        ]
        plan = plans[-2]
        assert plan.deferred
        assert plan.keeps_dz
        assert 2 * plan.rows <= 150
        assert_gradients_match(results[0][2], results[1][2], 1e-11)
        weights[0, plan.rows : 2 * plan.rows] = 0


def test_gradients_accumulate(plans):
    case = make_case(pairs=2, tokens=150)
    tensors = case.tensors()
    for _ in range(2):
        (linear_preference_loss(OBJECTIVES["tdpo2"], **tensors, logits_budget=300_000)[0] / 2).backward()
    assert plans[-1].deferred
    _, _, grads = loss_and_gradients(linear_preference_loss, case, OBJECTIVES["tdpo2"], scale=1.0)
    torch.testing.assert_close(tensors["weight"].grad, grads["weight"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("budget", [1 << 30, 700_000])
def test_rows_without_a_gradient_take_no_part_in_products(budget, plans, monkeypatch):
    case = make_case(torch.float64, pairs=2, tokens=150, ignored=0.0)
    weights = (torch.rand(case.labels.shape) < 0.25).double()
    multiplied = []

    def counted(a, b, out, **options):
        multiplied.append(len(b) if a.shape[0] == case.weight.shape[0] else 0)  # rows of a product for dW
        return product(a, b, out, **options)

    monkeypatch.setattr(tdpo_ext.fused.weight_gradient, "product", counted)

    @per_token
    def margin(chosen, rejected):
        return chosen.sum(chosen.columns["weight"] * chosen.logps) - rejected.sum(
            rejected.columns["weight"] * rejected.logps
        )

    objective = MarginLoss(margin, lambda margins: torch.nn.functional.softplus(-0.1 * margins))
    options = {"token_columns": {"weight": weights}, "logits_budget": budget}
    _, sides, grads = loss_and_gradients(linear_preference_loss, case, objective, **options)
    assert plans[-1].deferred == (budget < 1 << 30)
    assert sum(multiplied) == weights.sum()
    assert sides[0].tokens.tolist() == [150, 150]  # metrics are those of all rows
    without = Case(**{**vars(case), "labels": torch.where(weights > 0, case.labels, -100)})
    _, _, expected = loss_and_gradients(linear_preference_loss, without, objective, token_columns={"weight": weights})
    assert_gradients_match(grads, expected, 1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_any_shape_and_budget(way, plans):
    """Of logits as many rows fit the budget as a block has at least, or more."""

    @settings(max_examples=settings.default.max_examples // len(WAYS))
    @given(
        pairs=st.just(1) if way == "alone" else st.integers(2, 3),
        tokens=st.integers(35, 60) if way == "kept" else st.integers(60, 90),
        vocab=st.integers(100, 300),
        ignored=st.sampled_from([0.0, 0.1, 0.3]),
        rows=st.sampled_from([40, 64, 80]),
        objective=st.sampled_from(["tdpo2", "tdpo1", "smoothed dpo", "ipo"]),
        seed=st.integers(0, 1 << 30),
    )
    def check(pairs, tokens, vocab, ignored, rows, objective, seed):
        torch.manual_seed(seed)
        width = 200 if way == "kept" else 16
        case = make_case(torch.float64, pairs, tokens, width, vocab=vocab, ignored=ignored)
        function, budget = MARGIN_LOSSES[objective], rows * (16 * vocab + 8 * (2 * width + 24) + 128)
        loss, _, grads = loss_and_gradients(linear_preference_loss, case, function, logits_budget=budget)
        truth, _, true_grads = loss_and_gradients(eager.linear_preference_loss, case, function)
        torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-10)
        assert_gradients_match(grads, true_grads, 1e-9)

    check()
    deferred = [plan for plan in plans if kind_of(plan) == "deferred"]
    met = Counter(way_of(plan) for plan in deferred)
    assert met[way] >= 5, met


@pytest.mark.slow
def test_a_pair_of_twenty_thousand_rows_at_64_mib(plans):
    rows, width, vocab = 10_000, 32, 2_000
    case = make_case(pairs=1, tokens=rows, width=width, ref_width=width, vocab=vocab, ignored=0.0)
    budget = 64 << 20
    loss, sides, grads = loss_and_gradients(linear_preference_loss, case, OBJECTIVES["tdpo2"], logits_budget=budget)
    assert plans[-1].deferred
    assert plans[-1].bytes <= budget
    truth, true_sides, true_grads = loss_and_gradients(
        eager.linear_preference_loss, case, OBJECTIVES["tdpo2"], dtype=torch.float64
    )
    assert sides[0].tokens.item() == rows
    torch.testing.assert_close(sides[0].kl.double(), true_sides[0].kl, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=1e-6)  # sums are taken in float64
    for name in ("hidden", "weight"):  # the factor carries the rounding of sums over 10,000 tokens
        direction, expected = grads[name].double(), true_grads[name]
        cosine = (direction * expected).sum() / (direction.norm() * expected.norm())
        assert cosine > 1 - 1e-9


@pytest.mark.parametrize(
    "margin",
    [
        lambda chosen, rejected: chosen.logratio.square() - rejected.logratio,
        lambda chosen, rejected: chosen.kl * rejected.kl,
        lambda chosen, rejected: chosen.ref_logps * chosen.logps,
        lambda chosen, rejected: chosen.entropy * chosen.logps - rejected.logps,
    ],
)
def test_margins_that_are_not_linear_are_refused(margin):
    with pytest.raises(ValueError, match="margin that is not linear"):
        linear_preference_loss(MarginLoss(margin, torch.sigmoid), **make_case().tensors())


def clamped(chosen, rejected):
    return (chosen.logratio - rejected.logratio).clamp(-3, 3)


@per_token
def likely_tokens(chosen, rejected):
    return chosen.sum((chosen.logps > -6) * chosen.logratio) - rejected.sum((rejected.logps > -6) * rejected.logratio)


def halved_beyond_three(chosen, rejected):
    logratios = chosen.logratio - rejected.logratio
    return torch.where(logratios.detach().abs() < 3, logratios, logratios / 2)


@pytest.mark.parametrize("margin", [clamped, likely_tokens, halved_beyond_three])
def test_margins_that_are_linear_at_ordinary_values_only_are_refused_at_others(margin, plans):
    """The made-up pairs show nothing; the real values do, where the coefficients matter: in a long pair."""
    case = make_case(torch.float64, pairs=2, tokens=150)
    objective = MarginLoss(margin, torch.sigmoid)
    linear_preference_loss(objective, **case.tensors())  # whole pairs need no coefficients
    with pytest.raises(ValueError, match=f"objective has a margin that is not linear.*{margin.__name__}"):
        linear_preference_loss(objective, **case.tensors(), logits_budget=500_000)
    assert plans[-1].deferred
