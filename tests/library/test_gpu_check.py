"""tools/gpu_check.sh: its limits, and a rehearsal of its stages without a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
MEASURED = {"tests", "bench_logits", "bench_linear", "memcheck", "racecheck"}


def test_limits_add_up_to_less_than_nine_minutes():
    """Of each call: a device is lent for ten minutes a command."""
    limits = {name: int(limit) for name, limit in re.findall(r"^\s+stage (\w+) (\d+) ", SCRIPT.read_text(), re.M)}
    assert limits.keys() > MEASURED
    assert sum(limit for name, limit in limits.items() if name in MEASURED) <= 540
    assert sum(limit for name, limit in limits.items() if name not in MEASURED) <= 540


COLLECTED = """
import sys
import pytest
sys.modules |= dict.fromkeys(["hypothesis", "psutil", "yaml", "transformers", "datasets", "tdpo"])  # absent
sys.exit(pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", "-m", "cuda", "library"]))
"""


def test_the_cuda_tests_need_torch_and_pytest_alone():
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", COLLECTED]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT / "tests")
    assert done.returncode == 0, done.stdout
    for name in ("cuda_divergence", "cuda_linear", "vocab_parallel"):
        assert f"library/test_{name}.py: " in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("timeout") is None, reason="no coreutils")
def test_rehearsal(tmp_path):
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(SCRIPT), "--rehearse", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("warm_logits", "warm_linear", *MEASURED):
        assert f"ok      {stage} (" in done.stdout
    logits = json.loads((tmp_path / "bench_logits.json").read_text())["results"]
    assert {"published, eager", "published, compiled"} <= logits[0]["faster_than"].keys()
    for step in json.loads((tmp_path / "bench_linear.json").read_text())["steps"]:
        names = {row["candidate"] for row in step["candidates"]}
        assert {"tdpo_ext chunked", "products", "published, eager", "trl divergence and log-probabilities"} <= names
    assert "TRL" in done.stdout
