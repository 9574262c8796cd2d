"""The lists of tests/mutations still fit the code. `make mutations` applies them, which takes half an hour."""

from pathlib import Path

import mutations
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", mutations.listed(), ids=lambda mutation: mutation.file)
def test_mutations_still_apply(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.find) == 1
    assert mutation.replace != mutation.find
    assert mutation.tests
    for test in mutation.tests:
        assert (ROOT / "tests" / test.split("::")[0]).exists(), test
