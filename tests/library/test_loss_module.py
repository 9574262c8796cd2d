"""LinearTDPOLoss as a module: its options in print and on disk, its variants, weights of tokens, its help."""

import copy
import functools
import inspect
import io
import pickle

import pytest
import torch
from torch.nn.functional import logsigmoid

from helpers.linear_cases import BUDGETS, make_case
from tdpo_ext import LinearTDPOLoss, dpo_loss, eager, linear_preference_loss, per_token, tdpo_loss

OPTIONS = {"beta": 0.3, "alpha": 0.7, "variant": "tdpo1", "temperature": 0.9, "softcap": 20.0, "logits_budget": 90_000}


def call(loss_fn, tensors, **options):
    return loss_fn(*(tensors[name] for name in ("hidden", "weight", "ref_hidden", "ref_weight", "labels")), **options)


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_it_prints_its_options():
    text = repr(LinearTDPOLoss(**OPTIONS))
    assert all(f"{name}={value!r}" in text for name, value in OPTIONS.items())


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2", "dpo"])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), saved_and_loaded])
def test_copies_compute_the_same(variant, again):
    loss_fn, tensors = LinearTDPOLoss(**{**OPTIONS, "variant": variant}), make_case().tensors()
    other = again(loss_fn)
    assert repr(other) == repr(loss_fn)
    assert torch.equal(call(other, tensors)[0], call(loss_fn, tensors)[0])


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_dpo(budget):
    tensors = make_case(torch.float64).tensors()
    loss, _, _ = call(LinearTDPOLoss(beta=0.3, variant="dpo", logits_budget=budget), tensors)
    expected, _, _ = eager.linear_preference_loss(functools.partial(dpo_loss, beta=0.3), **tensors)
    torch.testing.assert_close(loss, expected)


def test_unknown_variants_are_answered_with_all_there_are():
    with pytest.raises(ValueError, match="variant is 'ipo'; allowed are 'tdpo1' and 'tdpo2' and 'dpo'"):
        LinearTDPOLoss(variant="ipo")


@pytest.mark.parametrize("budget", [*BUDGETS.values(), 500_000])
@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2", "dpo"])
def test_weights_of_tokens(variant, budget):
    tensors = make_case(torch.float64, pairs=2, tokens=150).tensors()
    weight = torch.rand(tensors["labels"].shape, dtype=torch.float64, requires_grad=True)
    alpha = {"tdpo1": 1.0, "tdpo2": 0.7, "dpo": 0.0}[variant]

    @per_token
    def expected_loss(chosen, rejected):
        def sums(side):
            w = side.columns["weight"]
            return side.sum(w * side.logratio), side.sum(w * side.kl)

        (chosen_ratio, chosen_kl), (rejected_ratio, rejected_kl) = sums(chosen), sums(rejected)
        chosen_kl = chosen_kl.detach() if variant == "tdpo2" else chosen_kl
        return -logsigmoid(0.3 * (chosen_ratio - rejected_ratio - alpha * (rejected_kl - chosen_kl)))

    leaves = [tensors["hidden"], tensors["weight"], weight]
    loss_fn = LinearTDPOLoss(beta=0.3, alpha=0.7, variant=variant, logits_budget=budget)
    loss, chosen, _ = call(loss_fn, tensors, token_columns={"weight": weight})
    expected, unweighted, _ = linear_preference_loss(expected_loss, **tensors, token_columns={"weight": weight})
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(chosen.logps, unweighted.logps)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("names", [["mask"], ["weight", "mask"]])
def test_columns_that_the_loss_does_not_read_are_refused(names):
    tensors = make_case().tensors()
    columns = {name: torch.ones(tensors["labels"].shape) for name in names}
    with pytest.raises(ValueError, match=r"token_columns has .*'mask'; this loss reads 'weight' alone"):
        call(LinearTDPOLoss(), tensors, token_columns=columns)


@pytest.mark.parametrize("function", [LinearTDPOLoss, LinearTDPOLoss.forward, tdpo_loss])
def test_help_describes_every_argument(function):
    described = inspect.getdoc(function)
    names = [name for name in inspect.signature(function).parameters if name != "self"]
    missing = [name for name in names if not any(name in line.split(":")[0] for line in described.splitlines())]
    assert not missing


@pytest.mark.parametrize("prefix", ["", "ref_"])
def test_autocast_around_the_body_alone_is_answered_with_what_to_do(prefix):
    tensors = make_case().tensors()
    tensors[f"{prefix}hidden"] = tensors[f"{prefix}hidden"].bfloat16()
    with pytest.raises(TypeError, match=f"{prefix}weight has dtype torch.float32 .*call the loss inside autocast"):
        call(LinearTDPOLoss(), tensors)
    with torch.autocast("cpu", torch.bfloat16):
        call(LinearTDPOLoss(), tensors)
