"""Fixtures of the library's tests."""

import pytest

import tdpo_ext.linear
from tdpo_ext.fused.planning.plan import make_plan


@pytest.fixture
def plans(monkeypatch):
    """The plans of the preference losses that a test takes, in order."""
    made = []

    def recorded(*arguments, **options):
        made.append(make_plan(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(tdpo_ext.linear, "make_plan", recorded)
    return made
