"""A head in parts that lie side by side is the head that they make together, in every function."""

import pytest
import torch

from helpers.linear_cases import OBJECTIVES, make_case
from tdpo_ext import linear_logps, linear_preference_loss, linear_token_divergence, linear_token_loss

WIDTHS, REF_WIDTHS = [3, 8, 5], [20, 4]  # of 16 and 24


def in_parts(tensors, widths=WIDTHS, ref_widths=REF_WIDTHS):
    """The same call with weights in parts, each a leaf of its own."""
    found = dict(tensors)
    for name, of_parts in (("weight", widths), ("ref_weight", ref_widths)):
        leaves = [part.detach().clone() for part in tensors[name].split(of_parts, dim=1)]
        found[name] = [part.requires_grad_(name == "weight") for part in leaves]
    return found


def preference_loss(tensors):
    return linear_preference_loss(OBJECTIVES["tdpo2"], **tensors)[0]


def distillation(tensors):
    return linear_token_loss(lambda values: values.kl / values.tokens, **tensors, kl_direction="reverse")[0]


def values(tensors):
    found = linear_token_divergence(**tensors)
    return (found.logps - 2 * found.kl).sum()


def logps(tensors):
    alone = {name: tensors[name] for name in ("hidden", "weight", "labels", "bias")}
    return linear_logps(**alone).sum()


FUNCTIONS = [preference_loss, distillation, values, logps]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_parts_make_the_whole(function):
    case = make_case(torch.float64, bias=True, ignored=0.1)
    whole = case.tensors()
    parts = in_parts(case.tensors())
    expected, found = function(whole), function(parts)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    expected.backward()
    found.backward()
    torch.testing.assert_close(parts["hidden"].grad, whole["hidden"].grad, rtol=1e-11, atol=1e-13)
    of_parts = torch.cat([part.grad for part in parts["weight"]], dim=1)
    torch.testing.assert_close(of_parts, whole["weight"].grad, rtol=1e-11, atol=1e-13)


def test_frozen_parts_get_no_gradient():
    parts = in_parts(make_case().tensors())
    parts["weight"][0].requires_grad_(False)
    preference_loss(parts).backward()
    assert parts["weight"][0].grad is None
    assert all(part.grad is not None for part in parts["weight"][1:])


def test_the_policy_alone_in_parts():
    case = make_case()
    parts = in_parts(case.tensors()) | {"ref_weight": case.ref_weight}
    torch.testing.assert_close(preference_loss(parts), preference_loss(case.tensors()))


BAD = {
    "no parts": (lambda parts: [], "^weight is an empty sequence"),
    "a part is no tensor": (lambda parts: [*parts, 3], r"^weight\[3\] is 3"),
    "widths": (lambda parts: parts[:-1], r"widths of weight, \[3, 8\], do not add up to hidden's, 16"),
    "another vocabulary": (lambda parts: [*parts[:-1], parts[-1][:-1]], r"^weight\[2\] has shape"),
    "another dtype": (lambda parts: [*parts[:-1], parts[-1].double()], r"^weight\[2\] has dtype torch.float64"),
    "no columns": (lambda parts: [*parts, parts[0][:, :0]], "a part of weight has no columns"),
    "a vector": (lambda parts: [*parts[:-1], parts[-1][0]], r"^weight\[2\] has shape"),
}


@pytest.mark.parametrize("mistake", BAD)
def test_bad_parts_are_named(mistake):
    change, message = BAD[mistake]
    parts = in_parts(make_case().tensors())
    with pytest.raises((TypeError, ValueError), match=message):
        preference_loss(parts | {"weight": change(parts["weight"])})
