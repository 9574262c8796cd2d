"""`make help` lists every target in a line; without one, `make` still runs the demo."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAKEFILE = ROOT / "Makefile"


def test_help_lists_every_target():
    command = ["make", "--no-print-directory", "help"]  # which may run under a make
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    targets = re.search(r"^\.PHONY: (.+)$", MAKEFILE.read_text(), re.MULTILINE)[1].split()
    listed = {line.split()[1]: line.split()[2:] for line in shown}
    assert listed.keys() == set(targets)
    assert all(listed.values())
    assert len(shown) == len(targets)


def test_the_first_target_is_the_demo():
    assert re.search(r"^([a-z-]+):(?! *=)", MAKEFILE.read_text(), re.MULTILINE)[1] == "demo"
