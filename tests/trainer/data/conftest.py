"""Fixtures of the tests of rows and tokens."""

import pytest

from helpers.model_families import make_tokenizer
from helpers.token_rows import CHAT


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer
