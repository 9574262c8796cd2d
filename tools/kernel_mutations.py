"""Breaks the kernels in one way after another and shows that the tests catch each.

python tools/kernel_mutations.py [--only WORD] [--jobs 2]

The mutations are the lists of tests/mutations. One that names Python tests is applied to a copy of the tree, whose
extension is built and tested. Any other is applied to a copy of csrc/ and tests/cpp/, whose emulator's tests are built
and run, first as they are and then under the address and undefined-behaviour sanitizers. The exit status is 1 if a
mutation survives, or if the tests fail without one. Needs cmake, ninja and a C++ compiler; takes half an hour.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = "address,undefined"
SECONDS = 600  # for the tests of one mutation; a change that makes them hang is noticed too


class Mutation(NamedTuple):
    """Source text that occurs exactly once in a file, what replaces it, and the Python tests that must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: Sequence[str] = ()  # pytest's names, relative to tests/; the emulator's tests where there are none

    def apply(self, root: Path) -> None:
        """Edits the file below `root`.

        Raises:
            ValueError: the source no longer holds `old` exactly once.
        """
        path = root / self.file
        source = path.read_text()
        if source.count(self.old) != 1:
            raise ValueError(f"{self.name}: {self.file} holds {self.old!r} {source.count(self.old)} times, not once")
        path.write_text(source.replace(self.old, self.new))


def listed() -> list[Mutation]:
    """The mutations of all lists."""
    lists = sorted((ROOT / "tests" / "mutations").glob("*.py"))
    return [Mutation(*entry) for path in lists for entry in runpy.run_path(str(path))["MUTATIONS"]]


def complaint(command: list[str], **options) -> str | None:
    """What a test program says if it fails; None if it passes."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, errors="replace", **options)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return None
    lines = (done.stdout + done.stderr).splitlines()
    telling = [line for line in lines if "FAILED" in line or "rror:" in line or "what():" in line]
    return (telling or lines or [f"exit status {done.returncode}"])[0].strip()


def emulated(mutation: Mutation | None, sanitize: bool) -> str | None:
    """What the emulator's tests say about the mutated kernels; None if they pass."""
    with tempfile.TemporaryDirectory() as scratch:
        root, build = Path(scratch, "source"), Path(scratch, "build")
        for folder in ("csrc", "tests/cpp"):
            shutil.copytree(ROOT / folder, root / folder)
        shutil.copy(ROOT / "CMakeLists.txt", root)
        if mutation:
            mutation.apply(root)
        # Not a build type of ours: -O1 compiles in half the time.
        configure = ["cmake", "-S", str(root), "-B", str(build), "-G", "Ninja", "-DTDPO_TESTS=ON"]
        configure += ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"]
        configure += [f"-DTDPO_SANITIZE={SANITIZERS if sanitize else ''}"]
        for command in (configure, ["cmake", "--build", str(build), "--target", "cuda_kernels_test"]):
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return complaint([str(build / "tests/cpp/cuda_kernels_test")])


def caught_by_emulator(mutation: Mutation) -> tuple[str, str] | None:
    """Which build of the emulator's tests caught the mutation, and how."""
    for build in ("tests", "sanitizers"):
        said = emulated(mutation, sanitize=build == "sanitizers")
        if said is not None:
            return build, said
    return None


class Checkout:
    """A copy of the tree with a build of its own, against which the Python tests run."""

    def __init__(self, root: Path):
        self.root = root
        tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")
        for name in filter(None, tracked):
            if (ROOT / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, root / name)

    def complaint(self, tests: Sequence[str]) -> str | None:
        """What the tests say after building what changed; None if they pass."""
        site = str(self.root / "site")  # receives both packages with all that was built
        build = [sys.executable, "setup.py", "--quiet", "build", "--build-lib", site]
        subprocess.run(build, cwd=self.root, check=True, stdout=subprocess.DEVNULL)
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
        return complaint(pytest, cwd=self.root / "tests", env={**os.environ, "PYTHONPATH": site})

    def caught_by(self, mutation: Mutation) -> tuple[str, str] | None:
        path = self.root / mutation.file
        source = path.read_text()
        mutation.apply(self.root)
        try:
            said = self.complaint(mutation.tests)
        finally:
            path.write_text(source)
        return None if said is None else ("pytest", said)


def outcomes(chosen: list[Mutation], jobs: int) -> Iterator[tuple[Mutation, tuple[str, str] | None]]:
    """Every mutation with what caught it, and how; None where nothing did."""
    emulator, python = ([one for one in chosen if bool(one.tests) == named] for named in (False, True))
    if emulator:
        for sanitize in (False, True):
            if said := emulated(None, sanitize):
                sys.exit(f"the emulator's tests fail without a mutation: {said}")
        with ThreadPoolExecutor(jobs) as pool:
            yield from zip(emulator, pool.map(caught_by_emulator, emulator))
    if python:
        with tempfile.TemporaryDirectory() as folder:
            checkout = Checkout(Path(folder))
            if said := checkout.complaint(sorted({test for mutation in python for test in mutation.tests})):
                sys.exit(f"the Python tests fail without a mutation: {said}")
            for mutation in python:
                yield mutation, checkout.caught_by(mutation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the mutations whose name or file contains this")
    parser.add_argument("--jobs", type=int, default=2, help="builds of the emulator's tests at a time")
    arguments = parser.parse_args()
    chosen = [mutation for mutation in listed() if arguments.only in f"{mutation.name} {mutation.file}"]
    survivors = 0
    for mutation, caught in outcomes(chosen, arguments.jobs):
        survivors += caught is None
        build, said = caught or ("SURVIVED", "")
        print(f"{mutation.name:48s} {build:10s} {said[:110]}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
