"""Fixtures of the trainer's tests."""

import pytest
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from helpers.model_families import make_tokenizer
from helpers.trainer_cases import make_preferences


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(autouse=True)
def without_deepspeed():
    """A configuration of DeepSpeed that a test makes stays with transformers, for all models that are loaded later."""
    yield
    unset_hf_deepspeed_config()


@pytest.fixture(scope="session")
def preferences():
    return make_preferences()
