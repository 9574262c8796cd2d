"""Builds what a release consists of, and tests it in several releases of torch.

python tools/release.py sdist                  the source distribution
python tools/release.py wheel [KIND ...]       cpu, a wheel for CPUs, and cuda, where nvcc is found, one for its CUDA
                                               release; if named, aarch64, cross-compiled for CPUs
python tools/release.py test TORCH [TORCH ...] the library's tests of one wheel and of a build from source, in a fresh
                                               environment for each torch
python tools/release.py check-tag TAG          fails unless the tag is "v" and the version of pyproject.toml

`dist` receives the files. Wheels are without the optional module _brgemm, and auditwheel gives them the manylinux tag
of the oldest system that they run on; torch's own libraries and the CUDA runtime, which torch loads, stay outside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

import build_backend
import build_cuda

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so.*")
# What tests the source tree and its tools instead of the installed binary.
OF_THE_SOURCE = [
    f"test_{name}.py"
    for name in ("build", "build_cuda", "build_messages", "release", "cuda_build", "docs", "gpu_check", "mutations")
]


def build_sdist() -> Path:
    """Writes the source distribution to dist."""
    code = "import build_backend, sys; print(build_backend.build_sdist(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-c", code, str(DIST)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return DIST / done.stdout.splitlines()[-1]


def package_version() -> str:
    """The version in pyproject.toml, from which every other place takes it."""
    found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def cuda_major() -> str | None:
    """The major CUDA release of the nvcc that a build finds; None where it finds none."""
    compiler = build_cuda.find_compiler()
    return compiler.major if compiler else None


def build_wheel(cuda: str | None) -> Path:
    """Writes a repaired wheel to dist, with kernels for a major CUDA release or for CPUs only."""
    environment = {**os.environ, "TDPO_BRGEMM": "0", "TDPO_CUDA": "0"}
    if cuda is not None:
        environment |= {"TDPO_CUDA": "1", "TDPO_LOCAL_VERSION": f"cu{cuda}"}
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(pip, env=environment, check=True)
        return repair(Path(folder), "--strip")


def build_aarch64_wheel() -> Path:
    """Writes a repaired wheel for 64-bit Arm and CPUs to dist, cross-compiled with a torch for Arm that is not kept."""
    oldest, suffix = build_backend.TORCH.replace(">=", "=="), f".{sys.implementation.cache_tag}-aarch64-linux-gnu.so"
    with tempfile.TemporaryDirectory() as folder:
        torch = Path(folder, "torch")
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "-d", str(torch)]
        subprocess.run([*pip, "--platform", "manylinux_2_28_aarch64", f"{oldest}.*"], check=True)
        (archive,) = torch.glob("*.whl")
        shutil.unpack_archive(archive, torch, "zip")
        archive.unlink()
        settings = {
            "CMAKE_TOOLCHAIN_FILE": ROOT / "tests/cpp/aarch64.cmake",
            "PYTHON_MODULE_EXTENSION": suffix,
            "Python_INCLUDE_DIR": sysconfig.get_path("include"),  # the headers are the same
        }
        environment = {
            **os.environ,
            "TDPO_BRGEMM": "0",
            "TDPO_CUDA": "0",
            "PYTHONPATH": f"{torch}:{ROOT / 'tools'}",  # that torch is found, and not imported
            "CMAKE_ARGS": " ".join(f"-D{name}={value}" for name, value in settings.items()),
            "SETUPTOOLS_EXT_SUFFIX": suffix,
            "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        }
        build = [sys.executable, "-c", "import build_backend, sys; build_backend.build_wheel(sys.argv[1])", folder]
        subprocess.run(build, cwd=ROOT, env=environment, check=True)
        return repair(Path(folder))


def repair(folder: Path, *options: str) -> Path:
    """Gives the one wheel in a folder its manylinux tag, and moves it to dist."""
    (built,) = folder.glob("*.whl")
    excluded = [argument for name in EXCLUDED for argument in ("--exclude", name)]
    repaired = folder / "repaired"
    command = [sys.executable, "-m", "auditwheel", "repair", *options, *excluded, "-w", str(repaired), str(built)]
    subprocess.run(command, check=True)
    (wheel,) = repaired.glob("*.whl")
    DIST.mkdir(exist_ok=True)
    return Path(shutil.move(wheel, DIST / wheel.name))


def build_wheels(kinds: list[str], required: bool) -> list[Path]:
    """The wheels of these kinds; without nvcc "cuda" is left out, or an error where it is required."""
    if unknown := set(kinds) - {"cpu", "cuda", "aarch64"}:
        raise SystemExit(f"unknown kind of wheel: {', '.join(sorted(unknown))}; allowed are cpu, cuda and aarch64")
    wheels = [build_wheel(None)] if "cpu" in kinds else []
    wheels += [build_aarch64_wheel()] if "aarch64" in kinds else []
    if "cuda" in kinds:
        cuda = cuda_major()
        if cuda is not None:
            wheels.append(build_wheel(cuda))
        elif required:
            raise SystemExit("a wheel with CUDA kernels was asked for, but nvcc was not found")
    return wheels


def counts_of(report: Path) -> dict[str, int]:
    """What became of the tests of a JUnit report."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    tests, *counts = (int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped"))
    return {"passed": tests - sum(counts), **dict(zip(("failures", "errors", "skipped"), counts))}


def test_package(python: str, package: Path, tests: list[str]) -> dict[str, str | int | float]:
    """Installs a wheel, or builds the source in ROOT as users do, and runs tests of it; returns their counts."""
    begin, built_here = time.monotonic(), package == ROOT
    # One architecture: the kernels include nothing of torch, and another test compiles them for all.
    environment = {"TDPO_CUDA_ARCHS": "90", **os.environ}
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{package}[library-test]"], check=True, env=environment)
    with tempfile.TemporaryDirectory() as folder:
        query = [python, "-c", "import json, tdpo_ext; print(json.dumps(tdpo_ext.build_info()))"]
        info = json.loads(subprocess.check_output(query, cwd=folder, text=True))
        if built_here and info["torch_built_with"] != info["torch"]:
            raise SystemExit(f"built with torch {info['torch_built_with']} where torch is {info['torch']}")
        report = Path(folder, "report.xml")
        pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
        subprocess.run(pytest, cwd=ROOT / "tests")  # its failures are in the report
        counts = counts_of(report)
    return {
        "torch": info["torch"],
        "package": "source" if built_here else "wheel",
        "built_with": info["torch_built_with"],
        "cuda_archs": info["cuda_archs"],
        **counts,
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }


def test_in_torches(wheel: Path | None, torches: list[str], tests: list[str], json_file: Path | None) -> int:
    """Tests a wheel, unless it is None, and a build from source in several releases of torch, each in an environment of
    its own; prints and saves the counts, and returns 1 if a test failed."""
    results = []
    for torch in torches:
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            python = str(Path(folder, "bin", "python"))
            subprocess.run([python, "-m", "pip", "install", "--quiet", torch, "numpy"], check=True)
            for package in [ROOT] if wheel is None else [wheel, ROOT]:
                results.append(test_package(python, package, tests))
                print(results[-1], flush=True)
    report: dict[str, object] = {"python": platform.python_version(), "results": results}
    if wheel is not None:
        report |= {"wheel": wheel.name, "wheel_bytes": wheel.stat().st_size}
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(result["failures"] or result["errors"] or not result["passed"] for result in results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sdist")
    wheel = commands.add_parser("wheel")
    wheel.add_argument("kinds", nargs="*", metavar="KIND", help="cpu, cuda or aarch64 (default: the first two)")
    test = commands.add_parser("test")
    test.add_argument("torches", nargs="+", metavar="TORCH", help="a requirement, such as 'torch==2.11.*'")
    test.add_argument("--wheel", type=Path, help="the wheel to test (default: a new one for CPUs)")
    test.add_argument("--source-only", action="store_true", help="test no wheel")
    test.add_argument("--tests", nargs="+", help="what to run in tests/ (default: the library's, of the binary)")
    test.add_argument("--json", type=Path, help="file for the counts")
    commands.add_parser("check-tag").add_argument("tag")
    arguments = parser.parse_args()
    if arguments.command == "sdist":
        print(build_sdist())
    elif arguments.command == "wheel":
        print(*build_wheels(arguments.kinds or ["cpu", "cuda"], required=bool(arguments.kinds)), sep="\n")
    elif arguments.command == "test":
        wheel_file = None if arguments.source_only else (arguments.wheel or build_wheel(None)).resolve()
        tests = arguments.tests or ["library", *(f"--ignore=library/{name}" for name in OF_THE_SOURCE)]
        return test_in_torches(wheel_file, arguments.torches, tests, arguments.json)
    elif arguments.tag != f"v{package_version()}":
        raise SystemExit(f"the tag is {arguments.tag} but pyproject.toml has version {package_version()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
