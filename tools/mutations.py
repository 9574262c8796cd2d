"""Breaks the code on purpose, one small change at a time, and reports which changes no test notices.

    python tools/mutations.py [--only FILE] [--json RESULTS]

A mutation is an entry of `MUTATIONS` in a file of tests/mutations: source text that occurs exactly once in a file, what
replaces it, and the tests that must fail then (pytest's names, relative to tests/). They are applied to a copy of the
tree, whose extension is rebuilt where a file of csrc is changed. Exits with 1 if a mutation survives or does not apply.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
BUILT = ("_C*.so", "_brgemm.so", "_built_with.py")  # what the build adds to tdpo_ext
DEPENDENCIES = ("torch", "transformers.trainer", "datasets", "peft", "trl.trainer.dpo_trainer", "hypothesis")
SECONDS = 600  # for the tests of one mutation; a change that makes them hang is noticed too


class Mutation(NamedTuple):
    """One change of one file."""

    file: str
    find: str
    replace: str
    tests: list[str]


class Scratch:
    """A copy of the tree in which the tests run against the copy's own packages."""

    def __init__(self, folder: Path):
        self.root = folder / "tree"
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
        for name in filter(None, tracked):
            if (ROOT / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.root / name)
        site = folder / "site"
        site.mkdir()
        (site / "tdpo").symlink_to(self.root / "python" / "tdpo")
        (site / "tdpo_ext").symlink_to(self.root / "tdpo_ext")
        self._site = str(site)

    def copy_extension(self) -> None:
        """Takes the compiled module from the installed package."""
        spec = find_spec("tdpo_ext")
        if spec is None or spec.origin is None:
            raise SystemExit("tdpo_ext is not installed")
        for pattern in BUILT:
            for built in Path(spec.origin).parent.glob(pattern):
                shutil.copy(built, self.root / "tdpo_ext")

    def build_extension(self) -> bool:
        """Compiles what changed since the last build."""
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        return subprocess.run(command, cwd=self.root, capture_output=True).returncode == 0

    def run_tests(self, tests: list[str]) -> int:
        """pytest's exit status, or 1 if the tests hang or crash."""
        child = os.fork()
        if child == 0:
            os.setsid()  # so that what the tests start can be stopped with them
            os.chdir(self.root / "tests")
            os.environ |= {"PYTHONPATH": self._site, "PYTHONDONTWRITEBYTECODE": "1"}
            sys.path.insert(0, self._site)
            sys.dont_write_bytecode = True
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
            os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1
            time.sleep(0.1)
        os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return 1


def import_dependencies() -> None:
    """Imports what takes the tests seconds, once for all forks. Nothing is computed: threads don't survive a fork."""
    for name in DEPENDENCIES:
        if find_spec(name.split(".")[0]) is not None:
            import_module(name)


def listed() -> list[Mutation]:
    """All mutations of tests/mutations; those of C++ last, so that Python's need no build."""
    lists = sorted((ROOT / "tests" / "mutations").glob("*.py"))
    mutations = [Mutation(**entry) for path in lists for entry in runpy.run_path(str(path))["MUTATIONS"]]
    return sorted(mutations, key=lambda mutation: mutation.file.startswith("csrc/"))


def judge(mutation: Mutation, scratch: Scratch) -> str:
    """`caught`, `survived`, or why the mutation says nothing."""
    path = scratch.root / mutation.file
    source = path.read_text()
    if source.count(mutation.find) != 1:
        return f"invalid: the text occurs {source.count(mutation.find)} times"
    path.write_text(source.replace(mutation.find, mutation.replace))
    try:
        if mutation.file.startswith("csrc/") and not scratch.build_extension():
            return "invalid: it does not compile"
        status = scratch.run_tests(mutation.tests)
    finally:
        path.write_text(source)
    outcomes = {0: "survived", 1: "caught"}
    return outcomes.get(status, f"invalid: pytest exits with {status}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="mutations of files whose path contains this text")
    parser.add_argument("--json", type=Path, help="where to write the outcomes")
    options = parser.parse_args()
    mutations = [mutation for mutation in listed() if options.only in mutation.file]
    import_dependencies()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Scratch(Path(folder))
        scratch.copy_extension()
        if scratch.run_tests(sorted({test for mutation in mutations for test in mutation.tests})) != 0:
            raise SystemExit("the tests fail without any mutation")
        for mutation in mutations:
            started = time.monotonic()
            outcome = judge(mutation, scratch)
            outcomes.append({**mutation._asdict(), "outcome": outcome})
            shown = " ".join(mutation.replace.split())[:60]
            print(f"{outcome:<10s} {time.monotonic() - started:5.0f} s  {mutation.file}: {shown}", flush=True)
    counts = {
        kind: sum(one["outcome"].startswith(kind) for one in outcomes) for kind in ("caught", "survived", "invalid")
    }
    print(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    if options.json:
        options.json.write_text(json.dumps({"counts": counts, "mutations": outcomes}, indent=1))
    return int(counts["caught"] != len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
