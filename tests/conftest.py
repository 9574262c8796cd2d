"""Settings and fixtures that all tests share."""

import os
from importlib.util import find_spec

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

try:
    import hypothesis
except ModuleNotFoundError:  # `pytest -m cuda` does without; the files that need it say so
    pass
else:
    # `HYPOTHESIS_PROFILE=nightly` draws ten times as many cases (`make test-nightly`).
    hypothesis.settings.register_profile("ci", max_examples=200, deadline=None)
    hypothesis.settings.register_profile("nightly", max_examples=2000, deadline=None)
    hypothesis.settings.register_profile("virtual-gpu", max_examples=100, deadline=None)
    hypothesis.settings.register_profile("virtual-gpu-nightly", max_examples=700, deadline=None)
    hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_ignore_collect(collection_path, config):
    """The tests of the virtual GPU's log need one (`make virtual-gpu`).

    With `-m cuda`, files without such tests are not imported: a GPU machine may have torch and pytest alone.
    """
    if collection_path.name == "virtual_gpu" and find_spec("virtual_gpu.queue") is None:
        return True
    if config.option.markexpr != "cuda" or not collection_path.name.startswith("test_"):
        return None
    text = collection_path.read_text()
    return not ("mark.cuda" in text or "helpers.cuda_support" in text) or None


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
