"""Fixtures of the library's tests."""

import contextlib
import fcntl
from pathlib import Path

import pytest
import torch

import tdpo_ext.fused.call
from helpers.device import DEVICE
from helpers.planning import plans_of_large_calls
from tdpo_ext.fused.planning.choose import make_plan


@pytest.fixture(autouse=True)
def device():
    """What tests make lies on the device that TDPO_TEST_DEVICE names."""
    with torch.device(DEVICE) if DEVICE != "cpu" else contextlib.nullcontext():
        yield DEVICE


@pytest.fixture
def plans(monkeypatch):
    """The plans of the preference losses that a test takes, in order."""
    made = []

    def recorded(*arguments, **options):
        made.append(make_plan(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(tdpo_ext.fused.call, "make_plan", recorded)
    return made


@pytest.fixture
def large_calls():
    """Plans are made as for large calls."""
    with plans_of_large_calls():
        yield


@pytest.fixture
def building_alone():
    """No other test builds in the source tree, whose folder `build` they share, at the same time."""
    folder = Path(__file__).parents[2] / "build"
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
