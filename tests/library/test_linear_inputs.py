"""The fused losses with every form of input: packed, frozen, tied, strided, autocast, accumulated, compiled."""

import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from helpers.linear_cases import BUDGETS, Case, ipo_loss, kind_of, loss_and_gradients, make_case
from tdpo_ext import eager, linear_preference_loss, linear_token_divergence
from tdpo_ext.fused.heads import CallTensors, Head


@pytest.mark.parametrize("budget", ["one chunk", "several chunks", "streamed"])
def test_packed_equals_padded(budget, plans):
    case = make_case(ignored=0.1)
    lengths = torch.tensor([11, 4, 7, 9, 11, 1])
    kept = torch.arange(11) < lengths[:, None]
    case.labels[~kept] = -100
    loss, sides, grads = loss_and_gradients(linear_preference_loss, case, ipo_loss, logits_budget=BUDGETS[budget])
    packed = Case(case.hidden[kept], case.weight, case.ref_hidden[kept], case.ref_weight, case.labels[kept], None, None)
    cu_seqlens = torch.cat([torch.zeros(1), lengths.cumsum(0)]).int()
    other, other_sides, other_grads = loss_and_gradients(
        linear_preference_loss, packed, ipo_loss, logits_budget=BUDGETS[budget], cu_seqlens=cu_seqlens
    )
    assert [kind_of(plan) for plan in plans] == [budget, budget]
    assert torch.equal(loss, other)
    assert torch.equal(sides[1].kl, other_sides[1].kl)
    torch.testing.assert_close(grads["weight"], other_grads["weight"])
    torch.testing.assert_close(grads["hidden"][kept], other_grads["hidden"])


@pytest.mark.parametrize("frozen", ["weight", "hidden", "both"])
@pytest.mark.parametrize("budget", ["one chunk", "streamed"])
def test_skips_what_nobody_asks_for(frozen, budget):
    case = make_case()
    full = loss_and_gradients(linear_preference_loss, case, ipo_loss, scale=1.0, logits_budget=BUDGETS[budget])
    tensors = case.tensors()
    for name in ("weight", "hidden") if frozen == "both" else (frozen,):
        tensors[name].requires_grad_(False)
    loss, _, _ = linear_preference_loss(ipo_loss, **tensors, logits_budget=BUDGETS[budget])
    assert torch.equal(loss.detach(), full[0])
    assert loss.requires_grad == (frozen != "both")
    if frozen != "both":
        loss.backward()
        other = "hidden" if frozen == "weight" else "weight"
        assert tensors[frozen].grad is None
        torch.testing.assert_close(tensors[other].grad, full[2][other])


@pytest.mark.parametrize("name", ["ref_hidden", "ref_weight", "ref_bias"])
def test_the_reference_has_no_graph(name):
    """Even where its tensors require gradients, as those of a policy's copy do; backward gives them none."""
    case = make_case(bias=True)
    for policy_trains in (False, True):
        tensors = {key: value.detach() for key, value in case.tensors().items()}
        tensors[name].requires_grad_()
        tensors["hidden"].requires_grad_(policy_trains)
        values = linear_token_divergence(**tensors, logits_budget=30_000)
        loss, _, _ = linear_preference_loss(ipo_loss, **tensors)
        assert values.kl.requires_grad == values.logps.requires_grad == loss.requires_grad == policy_trains
    (values.kl.sum() + loss).backward()
    assert tensors[name].grad is None
    assert tensors["hidden"].grad.any()


def test_tied_weights():
    case = make_case(width=16, ref_width=16)
    embedding = case.weight.clone().requires_grad_()
    hidden = embedding[torch.arange(66) % 301].view(6, 11, 16)
    loss, _, _ = linear_preference_loss(ipo_loss, hidden, embedding, case.ref_hidden, case.ref_weight, case.labels)
    (grad,) = torch.autograd.grad(loss, embedding)
    double = embedding.detach().double().requires_grad_()
    truth, _, _ = eager.linear_preference_loss(
        ipo_loss,
        double[torch.arange(66) % 301].view(6, 11, 16),
        double,
        case.ref_hidden.double(),
        case.ref_weight.double(),
        case.labels,
    )
    (true_grad,) = torch.autograd.grad(truth, double)
    assert (grad - true_grad).norm() / true_grad.norm() < 1e-5


def test_non_contiguous_inputs():
    case = make_case()
    plain = loss_and_gradients(linear_preference_loss, case, ipo_loss)
    tensors = case.tensors()
    strided = {
        "hidden": tensors["hidden"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_(),
        "weight": tensors["weight"].detach().t().contiguous().t().requires_grad_(),
    }
    loss, _, _ = linear_preference_loss(ipo_loss, **{**tensors, **strided})
    torch.testing.assert_close(loss.detach(), plain[0])
    (3 * loss).backward()
    for name, leaf in strided.items():
        torch.testing.assert_close(leaf.grad, plain[2][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", ["one chunk", "streamed"])
def test_autocast(budget):
    case = make_case()
    tensors = case.tensors()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = linear_preference_loss(ipo_loss, **tensors, logits_budget=BUDGETS[budget])
    loss.backward()
    assert tensors["weight"].grad.dtype == torch.float32
    low = make_case(torch.bfloat16)
    for name in ("hidden", "weight", "ref_hidden", "ref_weight"):
        setattr(low, name, getattr(case, name).bfloat16())
    low.labels = case.labels
    expected, _, grads = loss_and_gradients(
        linear_preference_loss, low, ipo_loss, scale=1.0, logits_budget=BUDGETS[budget]
    )
    torch.testing.assert_close(loss.detach(), expected)
    torch.testing.assert_close(tensors["weight"].grad, grads["weight"].float())


def test_accumulated_gradients_add_up():
    case = make_case(pairs=4)
    tensors = case.tensors()
    halves = [[0, 1, 4, 5], [2, 3, 6, 7]]
    for half in halves:
        part = {
            name: value[half] if name in ("hidden", "ref_hidden", "labels") else value
            for name, value in tensors.items()
        }
        (linear_preference_loss(ipo_loss, **part)[0] / 2).backward()
    _, _, grads = loss_and_gradients(linear_preference_loss, case, ipo_loss, scale=1.0)
    torch.testing.assert_close(tensors["weight"].grad, grads["weight"])
    torch.testing.assert_close(tensors["hidden"].grad, grads["hidden"])


def test_gradients_are_handed_over_once():
    loss, _, _ = linear_preference_loss(ipo_loss, **make_case().tensors(), logits_budget=1 << 30)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="earlier backward"):
        loss.backward()


def test_compiled_model_around_the_loss():
    case = make_case()
    layer = torch.nn.Linear(16, 16)

    def step(hidden):
        out = layer(hidden)
        return linear_preference_loss(ipo_loss, out, case.weight, case.ref_hidden, case.ref_weight, case.labels)[0]

    compiled = torch.compile(step, backend="eager")
    torch.testing.assert_close(compiled(case.hidden), step(case.hidden))
    compiled(case.hidden).backward()
    assert layer.weight.grad.norm() > 0


def packed_tensors():
    tensors = make_case(ignored=0.0).tensors()
    for name in ("hidden", "ref_hidden", "labels"):
        tensors[name] = tensors[name].detach().flatten(0, 1)
    return tensors


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([0, 11, 22, 33, 44, 54, 66], r"cu_seqlens is \[0, 11, .*, which row_lengths \(11, .* contradicts"),
        ([0, 11, 22, 33, 44, 66], r"cu_seqlens has shape \(6,\) but \(7,\) is needed"),
        ([0, 11, 22, 33, 44, 55, 66, 66], r"cu_seqlens has shape \(8,\) but \(7,\) is needed"),
    ],
)
def test_offsets_that_contradict_known_lengths(offsets, message):
    options = {"row_lengths": [11] * 6}
    linear_preference_loss(ipo_loss, **packed_tensors(), **options, cu_seqlens=11 * torch.arange(7))
    with pytest.raises(ValueError, match=message):
        linear_preference_loss(ipo_loss, **packed_tensors(), **options, cu_seqlens=torch.tensor(offsets))


@pytest.mark.parametrize("options", [{"row_lengths": [22] * 3}, {"cu_seqlens": 22 * torch.arange(4)}])
def test_packed_rows_of_an_odd_number_of_sequences(options):
    with pytest.raises(ValueError, match="labels hold 3 sequences; an even, positive number"):
        linear_preference_loss(ipo_loss, **packed_tensors(), **options)


def test_packed_rows_need_their_lengths():
    with pytest.raises(ValueError, match=r"labels has shape \(66,\); \(2B, T\) is needed, or cu_seqlens"):
        linear_preference_loss(ipo_loss, **packed_tensors())


def test_an_empty_vocabulary_is_refused():
    tensors = make_case().tensors()
    tensors |= {name: tensors[name].detach()[:0] for name in ("weight", "ref_weight")}
    for function in (linear_token_divergence, functools.partial(linear_preference_loss, ipo_loss)):
        with pytest.raises(ValueError, match="weight has no rows: the vocabulary is empty"):
            function(**tensors)


@pytest.mark.parametrize("name", ["weight", "bias", "ref_hidden", "ref_weight", "ref_bias", "labels"])
def test_tensors_of_another_device_are_named(name):
    """Shown without a GPU: tensors without data can be of any device."""
    with FakeTensorMode() as mode:
        tensors = {key: mode.from_tensor(value.detach()) for key, value in make_case(bias=True).tensors().items()}
        without_data = torch.empty_like(tensors[name], device="meta")
        tensors[name] = FakeTensor(mode, without_data, torch.device("cuda:0"))
        heads = [Head((tensors[f"{prefix}weight"],), tensors[f"{prefix}bias"]) for prefix in ("", "ref_")]
        call = CallTensors(tensors["hidden"], heads[0], tensors["ref_hidden"], heads[1], tensors["labels"])
        with pytest.raises(ValueError, match=f"^{name} is on cuda.* but hidden is on cpu"):
            call.check_shapes()


@pytest.mark.parametrize(
    "offsets", [[0, 9, 4, 20, 30, 40, 66], [0, 11, 22, 33, 44, 55, 65], [1, 11, 22, 33, 44, 55, 66]]
)
def test_offsets_that_do_not_rise_to_the_end(offsets):
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0"):
        linear_preference_loss(ipo_loss, **packed_tensors(), cu_seqlens=torch.tensor(offsets))


def test_known_lengths_equal_padded():
    case = make_case(ignored=0.0)
    loss, sides, grads = loss_and_gradients(linear_preference_loss, case, ipo_loss)
    packed = Case(
        hidden=case.hidden.flatten(0, 1),
        weight=case.weight,
        ref_hidden=case.ref_hidden.flatten(0, 1),
        ref_weight=case.ref_weight,
        labels=case.labels.flatten(),
        bias=None,
        ref_bias=None,
    )
    for budget in BUDGETS.values():
        other, other_sides, other_grads = loss_and_gradients(
            linear_preference_loss, packed, ipo_loss, row_lengths=[11] * 6, logits_budget=budget
        )
        torch.testing.assert_close(other, loss)
        torch.testing.assert_close(other_sides[0].kl, sides[0].kl)
        torch.testing.assert_close(other_grads["hidden"].view(6, 11, -1), grads["hidden"])


def test_known_lengths_keep_ignored_rows_out_of_the_loss():
    """Rows are not dropped then; an ignored one still contributes nothing."""
    tensors = packed_tensors()
    tensors["labels"][7] = -100
    tensors["hidden"][7] = torch.nan
    tensors["hidden"].requires_grad_()
    loss, chosen, _ = linear_preference_loss(ipo_loss, **tensors, row_lengths=[11] * 6)
    loss.backward()
    assert loss.isfinite()
    assert chosen.tokens.tolist() == [10, 11, 11]
    assert not tensors["hidden"].grad[7].any()
