"""Fixtures of the tests of runs."""

import pytest

from helpers.trainer_cases import FOUR_STEPS, make_trainer


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """The folder of a finished run of `FOUR_STEPS`, which no test may change."""
    folder = tmp_path_factory.mktemp("finished")
    make_trainer(folder, **FOUR_STEPS).train()
    return folder
