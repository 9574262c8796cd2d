"""Malformed calls of the public functions: each ends in an error that names its argument, none crashes."""

import math

import numpy as np
import pytest
import torch

import tdpo_ext
from helpers.linear_cases import ipo_loss, make_case
from helpers.logit_cases import random_rows
from tdpo_ext import MarginLoss, TokenDivergence

NOT_TENSORS = {"None": None, "a list": [1.0, 2.0], "a string": "abc", "an array": np.ones((4, 9)), "a number": 3}
# Made when a test needs them: quantized tensors warn.
STRANGE_TENSORS = {
    "sparse": lambda like: torch.eye(4).to_sparse(),
    "quantized": lambda like: torch.quantize_per_tensor(torch.ones(like.shape), 0.1, 0, torch.qint8),
    "meta": lambda like: torch.empty(like.shape, dtype=like.dtype, device="meta"),
    "complex": lambda like: torch.ones(like.shape, dtype=torch.complex64),
    "bool": lambda like: torch.ones(like.shape, dtype=torch.bool),
    "int8": lambda like: torch.ones(like.shape, dtype=torch.int8),
    "float8": lambda like: torch.ones(like.shape).to(torch.float8_e4m3fn),
}
NOT_NUMBERS = {
    "None": None,
    "a string": "0.5",
    "a list": [0.5],
    "a bool": True,
    "complex": 1j,
    "a tensor": torch.ones(2),
}
NOT_FINITE = {"nan": math.nan, "inf": math.inf}
NOT_INTEGERS = {"a float": 1.5, "a string": "1", "a list": [1], "a bool": True, "inf": math.inf}
NOT_FUNCTIONS = {"a string": "tdpo2", "a number": 3, "a tensor": torch.ones(2)}


def logit_arguments():
    return dict(zip(("logits", "ref_logits", "labels"), random_rows(4, 9)))


def linear_arguments():
    return make_case(bias=True).tensors()


def sides():
    value = torch.ones(2)
    return {name: TokenDivergence._make([value] * 6) for name in ("chosen", "rejected")}


def preference_loss(**arguments):
    return tdpo_ext.linear_preference_loss(arguments.pop("objective", ipo_loss), **arguments)


def module(**options):
    return tdpo_ext.LinearTDPOLoss(**options)


FUNCTIONS = {
    "token_divergence": (tdpo_ext.token_divergence, logit_arguments),
    "linear_token_divergence": (tdpo_ext.linear_token_divergence, linear_arguments),
    "linear_preference_loss": (preference_loss, linear_arguments),
    "LinearTDPOLoss": (module, dict),
    "tdpo_loss": (tdpo_ext.tdpo_loss, sides),
    "dpo_loss": (tdpo_ext.dpo_loss, sides),
    "rewards": (tdpo_ext.rewards, lambda: {"sequence": sides()["chosen"], "beta": 1.0}),
    "shift_labels": (tdpo_ext.shift_labels, lambda: {"labels": torch.tensor([1, 2])}),
    "MarginLoss": (MarginLoss, lambda: {"margin": ipo_loss, "link": torch.sigmoid}),
    "VocabShard": (tdpo_ext.VocabShard, lambda: {"start": 0, "stop": 3, "group": None}),
}


def malformed_calls():
    """(function, argument, what is wrong, value or a function of the good value)."""

    def all_of(function, argument, values):
        return [(function, argument, what, value) for what, value in values.items()]

    calls = []
    heads = ("hidden", "weight", "ref_hidden", "ref_weight")
    for function in ("linear_token_divergence", "linear_preference_loss"):
        for argument in (*heads, "labels"):
            calls += all_of(function, argument, NOT_TENSORS | STRANGE_TENSORS)
        for argument in ("bias", "ref_bias"):
            calls += all_of(function, argument, {k: v for k, v in NOT_TENSORS.items() if v is not None})
            calls += all_of(function, argument, STRANGE_TENSORS)
    for argument in ("logits", "ref_logits", "labels"):
        calls += all_of("token_divergence", argument, NOT_TENSORS | STRANGE_TENSORS)
    shaped = {"too few dimensions": lambda good: good.flatten(), "cut": lambda good: good[..., :-1]}
    for argument in (*heads, "bias", "ref_bias"):
        calls += all_of("linear_preference_loss", argument, {"cut": shaped["cut"]})
    calls += all_of("token_divergence", "ref_logits", shaped)
    calls += all_of("token_divergence", "labels", {"cut": shaped["cut"]})
    numbers = NOT_NUMBERS | NOT_FINITE | {"zero": 0.0, "negative": -1.0, "tiny": 1e-300, "huge": 1e300}
    for function in ("token_divergence", "linear_token_divergence", "linear_preference_loss", "LinearTDPOLoss"):
        calls += all_of(function, "temperature", numbers)
        calls += all_of(function, "kl_direction", {"unknown": "backward", "None": None, "a number": 1})
        calls += all_of(function, "softcap", {name: value for name, value in numbers.items() if value is not None})
        calls += all_of(function, "ignore_index", NOT_INTEGERS | {"None": None, "too large": 1 << 70})
        calls += all_of(function, "shard", {"a string": "world", "a tuple": (0, 3), "a number": 1})
    for function in ("linear_token_divergence", "linear_preference_loss", "LinearTDPOLoss"):
        budgets = {name: value for name, value in NOT_INTEGERS.items() if name != "a bool"}
        calls += all_of(function, "logit_scale", numbers)
        calls += all_of(function, "ref_logit_scale", numbers)
        calls += all_of(function, "logits_budget", budgets | NOT_FINITE | {"zero": 0, "negative": -5, "a bool": True})
    for function in ("tdpo_loss", "LinearTDPOLoss"):
        calls += all_of(function, "beta", NOT_NUMBERS | NOT_FINITE | {"zero": 0, "negative": -0.1})
        calls += all_of(function, "alpha", NOT_NUMBERS | NOT_FINITE | {"negative": -0.1})
        calls += all_of(function, "variant", {"unknown": "tdpo3", "None": None, "a number": 2, "upper case": "TDPO2"})
    calls += all_of("dpo_loss", "beta", NOT_NUMBERS | NOT_FINITE | {"zero": 0})
    calls += all_of("dpo_loss", "label_smoothing", NOT_NUMBERS | NOT_FINITE | {"a half": 0.5, "negative": -0.1})
    calls += all_of("rewards", "beta", NOT_NUMBERS | NOT_FINITE | {"zero": 0})
    other_length = TokenDivergence._make([torch.ones(1)] * 6)
    for function in ("tdpo_loss", "dpo_loss"):
        calls += all_of(function, "rejected", {"another length": other_length, "None": None, "a tensor": torch.ones(2)})
        calls += all_of(function, "chosen", {"None": None, "a tensor": torch.ones(2)})
    calls += all_of("rewards", "sequence", {"None": None, "a tensor": torch.ones(2)})
    calls += all_of("shift_labels", "labels", NOT_TENSORS | STRANGE_TENSORS | {"no dimension": torch.tensor(1)})
    calls += all_of("shift_labels", "labels", {"uint8": torch.ones(3, dtype=torch.uint8)})
    calls += all_of("shift_labels", "ignore_index", NOT_INTEGERS | {"None": None})
    calls += all_of("linear_preference_loss", "objective", NOT_FUNCTIONS)
    calls += all_of(
        "linear_preference_loss",
        "objective",
        {
            "infinite": lambda good: lambda chosen, rejected: chosen.logps * math.inf,
            "a scalar": lambda good: lambda chosen, rejected: chosen.logps.sum(),
            "a number": lambda good: lambda chosen, rejected: 1.0,
        },
    )
    calls += all_of("MarginLoss", "margin", NOT_FUNCTIONS | {"None": None})
    calls += all_of("MarginLoss", "link", NOT_FUNCTIONS | {"None": None})
    packed = {
        "bool": torch.tensor([False, True]),
        "floating": torch.tensor([0.0, 66.0]),
        "beside padded labels": torch.tensor([0, 33, 66]),
        "a list": [0, 33, 66],
        "meta": torch.empty(3, dtype=torch.int64, device="meta"),
    }
    calls += all_of("linear_preference_loss", "cu_seqlens", packed)
    lengths = {
        "a number": 66,
        "a string": "66",
        "floats": [33.0, 33.0],
        "negative": [-1, 67],
        "a tensor": torch.ones(2),
    }
    calls += all_of("linear_preference_loss", "row_lengths", lengths | {"another sum": [3, 4], "bools": [True, False]})
    calls += all_of("linear_preference_loss", "token_columns", {"a list": [1], "a tensor": torch.ones(6, 11)})
    calls += all_of("VocabShard", "start", NOT_INTEGERS | {"None": None, "negative": -1})
    calls += all_of("VocabShard", "stop", NOT_INTEGERS | {"None": None, "before start": -2})
    calls += all_of("VocabShard", "group", {"None": None, "a string": "world"})
    calls += all_of("VocabShard", "sum_hidden_grad", {"None": None, "a string": "yes", "a number": 1})
    return calls


CALLS = malformed_calls()


def test_there_are_hundreds():
    assert len(CALLS) >= 300


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("function", "argument", "what", "value"), CALLS, ids=[f"{c[0]}-{c[1]}-{c[2]}" for c in CALLS])
def test_malformed_call(function, argument, what, value):
    call, good = FUNCTIONS[function]
    arguments = good()
    if callable(value) and not isinstance(value, type):
        value = value(arguments.get(argument))
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        call(**{**arguments, argument: value})
    assert argument in str(raised.value), f"{argument} is not named: {raised.value}"


@pytest.mark.parametrize("function", [name for name in FUNCTIONS if name != "VocabShard"])
def test_the_good_call_is_good(function):
    call, good = FUNCTIONS[function]
    call(**good())
