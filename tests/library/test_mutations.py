"""What the nightly mutation runs need still fits the code: kernels' lists, and modules with their tests."""

import shutil
from pathlib import Path

import kernel_mutations
import pytest

import mutations

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutation", kernel_mutations.listed(), ids=lambda mutation: mutation.name)
def test_kernel_mutations_still_apply(mutation, tmp_path):
    """`make kernel-mutations` builds and tests each, which takes half an hour; here only the source is compared."""
    copy = tmp_path / mutation.file
    copy.parent.mkdir(parents=True)
    shutil.copy(ROOT / mutation.file, copy)
    mutation.apply(tmp_path)
    assert copy.read_text() != (ROOT / mutation.file).read_text()
    for test in mutation.tests:
        assert (ROOT / "tests" / test.split("::")[0]).exists(), test


def test_modules_and_their_tests():
    """Named ones are there, and a module whose test file mirrors it is found without being named."""
    known = mutations.modules()
    assert set(mutations.TESTS) <= set(known)
    for module in known:
        for test in mutations.tests_of(module):
            assert (ROOT / test).exists(), f"{module}: {test}"
    assert mutations.tests_of("tdpo_ext.linear") == ["tests/library/test_linear.py"]
    assert mutations.tests_of("tdpo.no_such_module") == []
