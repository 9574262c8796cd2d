"""Values of parameters that take the place of others for a while."""

import copy

import pytest
import torch
from tdpo.models.parameter_values import ParameterValues

from helpers.model_families import make_model
from helpers.trainer_cases import change_what_trains, with_trained_adapters


def test_values_come_back_bit_for_bit_after_an_error(tmp_path):
    policy = with_trained_adapters(make_model("llama"))
    initial, before = ParameterValues(policy), copy.deepcopy(policy.state_dict())
    change_what_trains(policy)
    trained = copy.deepcopy(policy.state_dict())
    with pytest.raises(ZeroDivisionError), initial.in_place():  # noqa: PT012
        assert all(torch.equal(value, before[name]) for name, value in policy.state_dict().items())
        raise ZeroDivisionError
    assert any(not torch.equal(value, before[name]) for name, value in trained.items())
    assert all(torch.equal(value, trained[name]) for name, value in policy.state_dict().items())
