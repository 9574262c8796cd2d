"""Fixtures of the trainer's tests."""

import pytest

from helpers.model_families import make_tokenizer
from helpers.trainer_cases import make_preferences


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def preferences():
    return make_preferences()
