"""The documentation: figures as measured, links that lead somewhere, public names that are documented."""

import subprocess
import sys
from pathlib import Path

import pytest
import tdpo

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("script", ["benchmarks/tables.py --check", "buildtools/check_docs.py"])
def test_figures_and_links(script):
    done = subprocess.run([sys.executable, *script.split()], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", tdpo.__all__)
def test_public_names_of_the_trainer_are_documented(name):
    assert getattr(tdpo, name).__doc__, f"{name} has no docstring"


def test_nothing_is_longer_than_it_should_be():
    folders = ("csrc", "tdpo_ext", "python", "tests", "benchmarks", "buildtools")
    kinds = {".py", ".cpp", ".h", ".cu", ".cuh"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    long = [path.name for path in files if len(path.read_text().splitlines()) > 400]
    assert not long
