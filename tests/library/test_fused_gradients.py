"""Which rows the gradients of a fused loss are made of, and in what precision they are summed, plan by plan."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import tdpo_ext.fused.planning.plan
import tdpo_ext.fused.run
import tdpo_ext.fused.streaming
import tdpo_ext.fused.weight_gradient
from helpers.linear_cases import OBJECTIVES, Case, kind_of, loss_and_gradients, make_case, not_a_margin_loss
from tdpo_ext import MarginLoss, eager, linear_preference_loss, linear_token_divergence, per_token
from tdpo_ext.fused.blocks import Factors
from tdpo_ext.fused.gradients import BiasGradient
from tdpo_ext.fused.heads import Head
from tdpo_ext.fused.planning.plan import LongPair, WholePairs
from tdpo_ext.ops import operators
from tdpo_ext.ops.matmul import product

pytestmark = pytest.mark.usefixtures("large_calls")

# Budgets of `long_case`, in whose pairs some 135 of 150 rows count.
BUDGETS = {"one chunk": 1 << 30, "several chunks": 900_000, "deferred": 500_000, "streamed": 500_000}


def long_case(dtype=torch.float64):
    return make_case(dtype, pairs=3, tokens=75, bias=True, ignored=0.1)


def objective_of(margin, plan):
    """The margin itself as loss; an ordinary function where a long pair shall be streamed."""
    return margin if plan == "streamed" else MarginLoss(margin, lambda margins: margins)


@pytest.fixture(params=["host looks", "host must not look"])
def host_looks(request, monkeypatch):
    """Whether the host looks at values, as on a CPU, to drop rows; on a GPU it would have to wait."""
    looks = request.param == "host looks"
    for module in (tdpo_ext.fused.run, tdpo_ext.fused.streaming):
        monkeypatch.setattr(module, "reading_is_free", lambda device: looks)
    return looks


def only_kls(chosen, rejected):
    return chosen.kl + 2 * rejected.kl


def only_the_chosen_kl(chosen, rejected):
    return chosen.kl


def only_the_rejected_kl(chosen, rejected):
    return -rejected.kl


def only_log_probabilities(chosen, rejected):
    return chosen.logps - 3 * rejected.logps


def everything(chosen, rejected):
    return only_kls(chosen, rejected) + only_log_probabilities(chosen, rejected)


MARGINS = [only_kls, only_the_chosen_kl, only_the_rejected_kl, only_log_probabilities, everything]


@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("plan", BUDGETS)
def test_losses_of_some_of_the_sums(margin, plan, host_looks, plans):
    case = long_case()
    found = loss_and_gradients(linear_preference_loss, case, objective_of(margin, plan), logits_budget=BUDGETS[plan])
    assert kind_of(plans[-1]) == plan
    truth = loss_and_gradients(eager.linear_preference_loss, case, margin)
    torch.testing.assert_close(found[0], truth[0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(found[2], truth[2], rtol=1e-9, atol=1e-11)


@per_token
def weighted(chosen, rejected):
    """Columns weigh every row's log-ratio and KL."""
    sides = [
        side.sum(side.columns["logratio"] * side.logratio + side.columns["kl"] * side.kl) for side in (chosen, rejected)
    ]
    return sides[0] - sides[1]


def columns_of(case):
    """Weights of which both, either or none is 0, and the sign that a row's values have in `weighted`."""
    columns = {name: torch.randn(case.labels.shape, dtype=torch.float64) for name in ("logratio", "kl")}
    for column in columns.values():
        column[torch.rand(column.shape) < 0.5] = 0.0
    sign = torch.ones(case.labels.shape, dtype=torch.float64)
    sign[len(sign) // 2 :] = -1
    return columns, sign


@pytest.mark.parametrize("plan", BUDGETS)
def test_losses_of_some_values_of_each_row(plan, host_looks, plans):
    case = long_case()
    columns, sign = columns_of(case)
    tensors, objective = case.tensors(), objective_of(weighted, plan)
    loss, _, _ = linear_preference_loss(objective, **tensors, token_columns=columns, logits_budget=BUDGETS[plan])
    loss.backward()
    assert kind_of(plans[-1]) == plan
    truth = case.tensors()
    values = eager.linear_token_divergence(**truth)
    (sign * (columns["logratio"] * values.logratio + columns["kl"] * values.kl)).sum().div(3).backward()
    for name in ("hidden", "weight", "bias"):
        torch.testing.assert_close(tensors[name].grad, truth[name].grad, rtol=1e-9, atol=1e-11)


def refuse_to_form_gradients(monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("a gradient of logits is formed")

    monkeypatch.setattr(operators, "logit_gradient_out", refused)


def frozen(tensors):
    return {name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()}


@pytest.mark.parametrize("plan", BUDGETS)
def test_columns_alone_want_a_gradient(plan, plans, monkeypatch):
    case = long_case()
    columns, sign = columns_of(case)
    values = eager.linear_token_divergence(**frozen(case.tensors()))
    refuse_to_form_gradients(monkeypatch)
    leaves = {name: column.requires_grad_() for name, column in columns.items()}
    objective = objective_of(weighted, plan)
    loss, _, _ = linear_preference_loss(
        objective, **frozen(case.tensors()), token_columns=leaves, logits_budget=BUDGETS[plan]
    )
    loss.backward()
    assert kind_of(plans[-1]) == plan
    torch.testing.assert_close(leaves["logratio"].grad, sign * values.logratio / 3, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(leaves["kl"].grad, sign * values.kl / 3, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("plan", ["one chunk", "streamed"])  # which takes no more products where there are no gradients
def test_no_gradients_are_formed_where_autograd_is_off(plan, plans, monkeypatch):
    case, options = long_case(), {"logits_budget": BUDGETS[plan]}
    expected, _, _ = loss_and_gradients(linear_preference_loss, case, only_kls, **options)
    values = linear_token_divergence(**case.tensors(), **options)
    refuse_to_form_gradients(monkeypatch)
    with torch.no_grad():
        loss, chosen, _ = linear_preference_loss(only_kls, **case.tensors(), **options)
        ours = linear_token_divergence(**case.tensors(), **options)
    assert [kind_of(made) for made in plans] == [plan, plan]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ours.kl, values.kl)
    assert not any(tensor.requires_grad for tensor in (loss, chosen.kl, ours.kl))


@pytest.mark.parametrize("plan", BUDGETS)
def test_no_gradients_are_formed_where_nothing_requires_them(plan, plans, monkeypatch):
    case, options = long_case(), {"logits_budget": BUDGETS[plan]}
    expected, _, _ = loss_and_gradients(linear_preference_loss, case, only_kls)
    refuse_to_form_gradients(monkeypatch)
    loss, _, _ = linear_preference_loss(objective_of(only_kls, plan), **frozen(case.tensors()), **options)
    assert kind_of(plans[-1]) == plan
    torch.testing.assert_close(loss, expected)
    assert not loss.requires_grad


@pytest.mark.parametrize(
    ("margin", "sides"),
    [
        (only_kls, (0, 1)),
        (only_the_chosen_kl, (0,)),
        (only_the_rejected_kl, (1,)),
        (not_a_margin_loss, (1,)),
        (only_log_probabilities, ()),
    ],
)
def test_the_reference_is_multiplied_again_where_a_kl_has_a_gradient(margin, sides, host_looks, plans, monkeypatch):
    """Of streamed pairs; a row without any gradient is dropped where the host looks."""
    case, multiplied, logits = long_case(), Counter(), Head.logits

    def counted(head, hidden, columns, out):
        multiplied[head.width] += len(hidden) * (columns.stop - columns.start)
        return logits(head, hidden, columns, out)

    monkeypatch.setattr(Head, "logits", counted)
    loss_and_gradients(linear_preference_loss, case, margin, logits_budget=BUDGETS["streamed"])
    assert kind_of(plans[-1]) == "streamed"
    rows = [int((half != -100).sum()) for half in case.labels.chunk(2)]
    with_kl = sum(rows[side] for side in sides)
    no_gradient = with_kl if host_looks and margin in (only_the_chosen_kl, only_the_rejected_kl) else sum(rows)
    width, ref_width = case.weight.shape[1], case.ref_weight.shape[1]
    assert multiplied == {width: 301 * (sum(rows) + no_gradient), ref_width: 301 * (sum(rows) + with_kl)}


# (width, objective, rows of a streaming block): dW is narrow beside dz, or wide.
SUMS = {
    "narrow": (16, OBJECTIVES["tdpo1"], 4096),
    "wide": (400, OBJECTIVES["tdpo1"], 4096),
    "streamed": (16, not_a_margin_loss, 4096),
    "streamed in blocks": (16, not_a_margin_loss, 40),
}


@pytest.mark.parametrize("sums", SUMS)
def test_nothing_is_summed_in_low_precision(sums, plans, monkeypatch):
    """By any plan from one chunk to blocks of a few rows: what has low precision is written once."""
    width, objective, streaming_rows = SUMS[sums]

    def checked(a, b, out, *, accumulate=False):
        assert not accumulate or out.dtype == torch.float32
        return product(a, b, out, accumulate=accumulate)

    monkeypatch.setattr(tdpo_ext.fused.weight_gradient, "product", checked)
    monkeypatch.setattr(tdpo_ext.fused.planning.choose, "STREAMING_ROWS", streaming_rows)
    case = make_case(torch.bfloat16, pairs=4, tokens=50, width=width, ref_width=8, vocab=97, ignored=0.0)
    row = 97 * 10 + 2 * (2 * width + 8) + 128
    met = Counter()
    for rows in (400, 399, 200, 100, 99, 64):
        for beside in (0, 97 * width * 2):
            loss_and_gradients(linear_preference_loss, case, objective, logits_budget=rows * row + beside)
            plan = plans[-1]
            met[kind_of(plan)] += 1
            met["dz kept"] += kind_of(plan) != "streamed" and plan.keeps_dz
            met["summed in float32"] += kind_of(plan) != "streamed" and plan.sums_weight
    expected = {
        "narrow": {"one chunk", "several chunks", "deferred", "summed in float32"},
        "wide": {"one chunk", "several chunks", "deferred", "dz kept"},
    }
    streamed = {"one chunk", "several chunks", "streamed"}
    assert expected.get(sums, streamed) <= {kind for kind, count in met.items() if count}, met


@pytest.mark.parametrize("factor", [None, 1.0])
def test_dbias_is_summed_in_float32(factor):
    """192 blocks that add up to 1.00389 each; rounded to bfloat16 before or while they are added, 192 or 256."""
    inputs = SimpleNamespace(
        vocab=2, logit_dtype=torch.float32, weight_dtype=torch.bfloat16, device=torch.device("cpu")
    )
    gradient, dz = BiasGradient(inputs), torch.tensor([[1.0], [0.00389]]).bfloat16()
    factors = Factors([(2, None if factor is None else torch.tensor(factor))])
    for _ in range(192):
        gradient.add(slice(1, 2), dz, factors)
    dbias = gradient.finish().rounded(torch.ones(()))
    assert dbias.tolist() == [0.0, 193.0]
    assert dbias.dtype == torch.bfloat16


def test_a_long_pair_s_factor_is_not_that_of_the_pairs_before_it(plans):
    """Pairs of 21 and of 260 rows: the first is whole, and its dz is still kept when that of the second is scaled."""
    lengths = [12, 120, 9, 140]
    case = make_case(torch.float64, pairs=1, tokens=141, width=300, ignored=0.0)
    flat = {name: getattr(case, name).flatten(0, 1)[:281] for name in ("hidden", "ref_hidden", "labels")}
    packed = Case(**{**vars(case), **flat})
    options = {"row_lengths": lengths}
    found = loss_and_gradients(linear_preference_loss, packed, OBJECTIVES["tdpo1"], logits_budget=1_400_000, **options)
    assert plans[-1].chunks == (WholePairs(0, 1), LongPair(1))
    assert plans[-1].dz_rows == 281
    whole = loss_and_gradients(linear_preference_loss, packed, OBJECTIVES["tdpo1"], **options)
    assert kind_of(plans[-1]) == "one chunk"
    torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gradient_of_a_tied_embedding_is_added_in_place(dtype):
    """As autograd does where nothing else holds the memory of dW; their sum would be a third tensor of its size."""
    weight, labels = torch.randn(300, 16, dtype=dtype).requires_grad_(), torch.randint(300, (12,))
    hidden = torch.nn.functional.embedding(torch.randint(300, (12,)), weight)
    reference = hidden.detach(), weight.detach()
    loss, *_ = linear_preference_loss(everything, hidden, weight, *reference, labels, row_lengths=[6, 6])
    memory = loss.grad_fn.gradients[2].values.data_ptr()
    loss.backward()
    assert weight.grad.data_ptr() == memory
