"""The documentation: figures match the results, links lead to files, public names have docstrings."""

import subprocess
import sys
from pathlib import Path

import pytest
import tdpo

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("script", ["benchmarks/report --check", "tools/check_docs.py"])
def test_figures_and_links(script):
    done = subprocess.run([sys.executable, *script.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", tdpo.__all__)
def test_public_names_of_the_trainer_are_documented(name):
    assert getattr(tdpo, name).__doc__, f"{name} has no docstring"


def test_no_file_is_longer_than_400_lines():
    folders = ("csrc", "tdpo_ext", "python", "tests", "benchmarks", "tools")
    kinds = {".py", ".sh", ".cpp", ".h", ".cu", ".cuh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    long = [path.name for path in files if len(path.read_text().splitlines()) > 400]
    assert not long
