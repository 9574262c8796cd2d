"""Builds what a release consists of, and tests a wheel in several releases of torch.

python tools/release.py sdist              the source distribution
python tools/release.py wheel              the wheel for CPUs and, where nvcc is found, one for its CUDA release
python tools/release.py test WHEEL TORCH [TORCH ...]   the library's tests in a fresh environment for each requirement

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
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
EXCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so.*")
# What tests the source tree and its tools instead of the installed binary.
OF_THE_SOURCE = [f"test_{name}.py" for name in ("build", "release", "cuda_build", "docs", "gpu_check", "mutations")]


def build_sdist() -> Path:
    """Writes the source distribution to dist."""
    code = "import build_backend, sys; print(build_backend.build_sdist(sys.argv[1]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools")}
    command = [sys.executable, "-c", code, str(DIST)]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return DIST / done.stdout.splitlines()[-1]


def cuda_major() -> str | None:
    """The major CUDA release of nvcc, where one is found."""
    home = os.environ.get("CUDA_HOME")
    nvcc = str(Path(home, "bin", "nvcc")) if home else shutil.which("nvcc")
    if nvcc is None or not Path(nvcc).exists():
        return None
    said = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"release (\d+)\.", said)
    return found and found.group(1)


def build_wheel(cuda: str | None) -> Path:
    """Writes a repaired wheel to dist, with kernels for a major CUDA release or for CPUs only."""
    environment = {**os.environ, "TDPO_BRGEMM": "0", "TDPO_CUDA": "0"}
    if cuda is not None:
        environment |= {"TDPO_CUDA": "1", "TDPO_LOCAL_VERSION": f"cu{cuda}"}
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", folder, str(ROOT)]
        subprocess.run(pip, env=environment, check=True)
        (built,) = Path(folder).glob("*.whl")
        excluded = [argument for name in EXCLUDED for argument in ("--exclude", name)]
        repaired = Path(folder, "repaired")
        repair = [sys.executable, "-m", "auditwheel", "repair", "--strip", *excluded, "-w", str(repaired), str(built)]
        subprocess.run(repair, check=True)
        (wheel,) = repaired.glob("*.whl")
        DIST.mkdir(exist_ok=True)
        return Path(shutil.move(wheel, DIST / wheel.name))


def test_wheel(wheel: Path, torch: str, folder: Path) -> dict[str, str | int | float]:
    """The library's tests of an installed wheel, in a new environment with the torch of a requirement."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python, report = str(folder / "bin" / "python"), folder / "report.xml"
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, torch, "numpy"], check=True)
    subprocess.run([*pip, f"{wheel}[library-test]"], check=True)
    subprocess.run([python, "-m", "tdpo_ext"], check=True, cwd=folder)
    ignored = [f"--ignore=library/{name}" for name in OF_THE_SOURCE]
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *ignored, "library"]
    subprocess.run(pytest, cwd=ROOT / "tests")  # its failures are in the report
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    version = [python, "-c", "import torch; print(torch.__version__)"]
    return {
        "torch": subprocess.check_output(version, text=True).strip(),
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        **{name: counts[name] for name in ("failures", "errors", "skipped")},
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }


def test_in_torches(wheel: Path, torches: list[str], json_file: Path | None) -> int:
    """Tests one wheel in several releases of torch, prints and saves the counts; returns 1 if a test failed."""
    results = []
    for torch in torches:
        with tempfile.TemporaryDirectory() as folder:
            results.append(test_wheel(wheel, torch, Path(folder)))
        print(f"{wheel.name} in torch {results[-1]['torch']}: {results[-1]}", flush=True)
    report = {
        "wheel": wheel.name,
        "wheel_bytes": wheel.stat().st_size,
        "python": platform.python_version(),
        "results": results,
    }
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n")
    return int(any(result["failures"] or result["errors"] or not result["passed"] for result in results))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("sdist")
    commands.add_parser("wheel")
    test = commands.add_parser("test")
    test.add_argument("wheel", type=Path)
    test.add_argument("torches", nargs="+", metavar="TORCH", help="a requirement, such as 'torch==2.11.*'")
    test.add_argument("--json", type=Path, help="file for the counts")
    arguments = parser.parse_args()
    if arguments.command == "sdist":
        print(build_sdist())
    elif arguments.command == "wheel":
        kinds: set[str | None] = {None, cuda_major()}
        for kind in sorted(kinds, key=str):
            wheel = build_wheel(kind)
            print(f"{wheel} ({wheel.stat().st_size:,} bytes)")
    else:
        return test_in_torches(arguments.wheel.resolve(), arguments.torches, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
