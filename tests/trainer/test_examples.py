"""The examples that run without a hub."""

import runpy
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_distillation():
    kls = runpy.run_path(str(EXAMPLES / "distillation.py"))["main"](steps=6)
    assert kls[-1] < kls[0]
    assert all(kl > 0 for kl in kls)
