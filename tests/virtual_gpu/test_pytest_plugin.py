"""The plugin of the virtual GPU's tests: an error that only a later synchronisation would show fails its own test."""

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import torch

def test_reads_outside():
    torch.zeros(3, device="cuda")[torch.tensor([5], device="cuda")]

def test_reads_inside():
    assert torch.zeros(3, device="cuda")[torch.tensor([2], device="cuda")].item() == 0
"""


def test_an_error_that_nothing_waits_for_fails_its_test_and_no_other(tmp_path):
    Path(tmp_path, "test_it.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"]
    environment = {**os.environ, "VIRTUAL_GPU_LATE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "ERROR test_it.py::test_reads_outside" in done.stdout, done.stdout
    assert "2 passed, 1 error" in done.stdout, done.stdout
