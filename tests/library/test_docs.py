"""The documentation: figures match the results, links lead to files, public names have docstrings."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import tdpo
import yaml

from helpers.messages import templates

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


def test_troubleshooting_quotes_messages_that_exist():
    """In the first column of its tables, and where a paragraph begins with one."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = [text.rstrip(" .") for text in re.findall(r"^(?:\| )?`([^`]+)`", page, re.MULTILINE)]
    sources = ("python/tdpo/**/*.py", "tdpo_ext/**/*.py", "tools/build_*.py", "setup.py")
    files = [file for pattern in sources for file in ROOT.glob(pattern)]
    known = [text for file in files for text in templates(file.read_text())]
    quoted = [text for text in quoted if " " in text and not text.startswith("--")]
    assert len(quoted) > 30
    assert not [text for text in quoted if not any(text in message for message in known)]


def test_the_citation_is_of_this_package():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == project["version"]
    assert citation["title"] == f"{project['name']}: {project['description'][0].lower()}{project['description'][1:]}"
    assert citation["license"] == project["license"]
    assert citation["authors"] == project["authors"]
    assert f"## {project['version'].split('.dev')[0]} (" in (ROOT / "CHANGELOG.md").read_text()
    paper, bibtex = citation["preferred-citation"], (ROOT / "README.md").read_text().split("@inproceedings")[1]
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert f"{{{' and '.join(names)}}}" in bibtex
    assert f"{{{paper['title']}}}" in bibtex
    assert f"{{{paper['collection-title']}}}" in bibtex
    assert f"{{{paper['year']}}}" in bibtex
