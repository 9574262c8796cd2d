"""Mutation scores: mutmut changes a module in many small ways, and its tests must notice each change.

    python tools/mutations.py [MODULE ...] [--all] [--jobs 2] [--output FOLDER]

MODULE is a dotted name, such as tdpo_ext.losses; by default those in benchmarks/results/mutations.json are measured
again. Every module's counts are added to that file, from which docs/reliability.md has its table. The changes that no
test noticed are printed; `mutmut show NAME`, run in the folder that is named there, shows one as a diff.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRATCH = ROOT / "build" / "mutations"
BUILT = ("_C*.so", "_brgemm.so", "_built_with.py")  # what the build adds to tdpo_ext
# Import package -> where its source and its tests are.
PACKAGES = {"tdpo_ext": ("tdpo_ext", "tests/library"), "tdpo": ("python/tdpo", "tests/trainer")}
# Tests that aren't the file of the module's name, or not alone, below the folder of the package's tests.
TESTS = {
    "tdpo_ext.checks": ["test_bad_arguments.py"],
    "tdpo_ext.fused.chunked": ["test_any_batch.py", "test_deferred.py", "test_linear.py"],
    "tdpo_ext.fused.heads": ["test_linear_inputs.py", "test_bad_arguments.py", "test_linear.py"],
    "tdpo_ext.fused.objective_gradient": ["test_any_batch.py", "test_per_token.py", "test_deferred.py"],
    "tdpo_ext.fused.planning.costs": ["test_costs.py", "test_plan.py"],
    "tdpo_ext.fused.planning.sizes": ["test_plan.py"],
    "tdpo_ext.fused.rows": ["test_linear_inputs.py", "test_no_waits.py", "test_per_token.py", "test_any_batch.py"],
    "tdpo_ext.losses": ["test_losses.py", "test_objectives.py", "test_bad_arguments.py", "test_per_token.py"],
    "tdpo_ext.compilation": ["test_compiler.py"],
    "tdpo_ext.made_up_pairs": ["test_objectives.py", "test_objective_parameters.py"],
    "tdpo_ext.objective_checks": [
        "test_objectives.py",
        "test_objective_parameters.py",
        "test_per_token.py",
        "test_bad_arguments.py",
        "test_deferred.py",
    ],
}
BESIDE = ("tests", "tools", "benchmarks", "examples", "docs")  # what tests read beside the packages
CONFIGURATION = """
[tool.mutmut]
source_paths = {packages}
only_mutate = ["{file}"]
also_copy = {beside}
pytest_add_cli_args = ["-p", "no:cacheprovider"]
pytest_add_cli_args_test_selection = {tests}
"""


def tests_of(module: str) -> list[str]:
    """Paths of a module's test files: those of `TESTS`, or else test_NAME.py at the place that mirrors the module's."""
    package, *folders, name = module.split(".")
    home = ROOT / PACKAGES[package][1]
    if module in TESTS:
        found = [home / name for name in TESTS[module]]
    else:
        mirrored = (home.joinpath(*folders, f"test_{name}.py"), home / f"test_{name}.py")
        found = [path for path in mirrored if path.exists()][:1]
    return [str(path.relative_to(ROOT)) for path in found]


def modules() -> list[str]:
    """The modules that have tests of their own."""
    names = []
    for package, (source, _) in PACKAGES.items():
        for path in sorted((ROOT / source).rglob("*.py")):
            module = ".".join((package, *path.relative_to(ROOT / source).with_suffix("").parts))
            if tests_of(module):
                names.append(module)
    return names


def prepare(folder: Path, module: str) -> None:
    """Fills a folder with what mutmut needs: importable packages, what their tests read, and its options."""
    shutil.rmtree(folder, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__")
    for package, (source, _) in PACKAGES.items():
        shutil.copytree(ROOT / source, folder / package, ignore=ignored)
    for name in BESIDE:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    spec = find_spec("tdpo_ext")
    if spec is None or spec.origin is None:
        raise SystemExit("tdpo_ext is not installed")
    for pattern in BUILT:
        for built in Path(spec.origin).parent.glob(pattern):
            shutil.copy(built, folder / "tdpo_ext")
    configuration = CONFIGURATION.format(
        packages=json.dumps(list(PACKAGES)),
        beside=json.dumps(BESIDE),
        file=module.replace(".", "/") + ".py",
        tests=json.dumps(tests_of(module)),
    )
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + configuration)


def measure(module: str, jobs: int) -> dict[str, int | float]:
    """Counts of a module's mutants: all, noticed by a test, and not even run by one."""
    folder = SCRATCH / module
    prepare(folder, module)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # others don't survive the forks
    mutmut = [str(Path(sys.executable).with_name("mutmut"))]  # with -m, the folder itself would be imported from
    begin = time.monotonic()
    with open(folder / "log.txt", "w") as log:
        command = [*mutmut, "run", "--max-children", str(jobs)]
        done = subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode != 0:
        raise SystemExit(f"mutmut failed on {module}: {folder / 'log.txt'}")
    minutes = (time.monotonic() - begin) / 60
    survivors = subprocess.check_output([*mutmut, "results"], cwd=folder, env=environment, text=True)
    subprocess.run([*mutmut, "export-cicd-stats"], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    counts = json.loads((folder / "mutants" / "mutmut-cicd-stats.json").read_text())
    unnoticed = counts["survived"] + counts["no_tests"]
    print(
        f"{module}: {counts['total'] - unnoticed} of {counts['total']} noticed; in {folder}:\n{survivors}", flush=True
    )
    return {
        "mutants": counts["total"],
        "noticed": counts["total"] - unnoticed,
        "not_run": counts["no_tests"],
        "minutes": round(minutes, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="dotted names; those in the results by default")
    parser.add_argument("--all", action="store_true", help="every module that has tests: takes hours")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="mutants tested at a time")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the counts")
    arguments = parser.parse_args()
    known = modules()
    if unknown := set(arguments.modules) - set(known):
        parser.error(f"no tests are known for {', '.join(sorted(unknown))}; there are some for {', '.join(known)}")
    path = arguments.output / "mutations.json"
    scores = json.loads(path.read_text())["modules"] if path.exists() else {}
    for moved in set(scores) - set(known):
        print(f"{moved} is no module with tests any more: its counts are dropped")
        del scores[moved]
    for module in known if arguments.all else arguments.modules or sorted(scores):
        scores[module] = measure(module, arguments.jobs)
        path.write_text(json.dumps({"modules": dict(sorted(scores.items()))}, indent=1) + "\n")


if __name__ == "__main__":
    main()
