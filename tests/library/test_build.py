"""The build: the C++ tests, the errors of a broken installation, and the wheel in a fresh environment."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build_backend
import pytest
import torch

import tdpo_ext

ROOT = Path(__file__).parents[2]
PACKAGE = Path(tdpo_ext.__file__).parent


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_cpp_tests(tmp_path):
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", ROOT, "-B", build, "-DTDPO_TESTS=ON"],
        ["cmake", "--build", build],
        ["ctest", "--test-dir", build, "--output-on-failure", "--no-tests=error"],
    ):
        done = run(*map(str, command))
        assert done.returncode == 0, done.stdout + done.stderr


def copy_without(tmp_path, *patterns):
    copy = tmp_path / "tdpo_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", *patterns))
    return copy


def import_error(tmp_path):
    # An editable install would find the modules that the copy lacks in the source tree.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]; import tdpo_ext"
    done = run(sys.executable, "-c", code, cwd=tmp_path)
    assert done.returncode != 0
    return done.stderr.strip().splitlines()[-1]


def test_import_without_the_compiled_module(tmp_path):
    copy_without(tmp_path, "_C.*", "_built_with.*")
    message = import_error(tmp_path)
    assert message.startswith("ImportError: tdpo_ext is not built here")
    assert "pip install ." in message


def test_import_with_another_torch(tmp_path):
    copy = copy_without(tmp_path)
    (copy / "_built_with.py").write_text('TORCH = "2.3.1+cu121"\n')
    message = import_error(tmp_path)
    assert "built for torch 2.3.1+cu121" in message
    assert torch.__version__ in message
    assert "pip install" in message


@pytest.mark.parametrize("missing", [[], ["pybind11"], ["pybind11", "ninja"], ["setuptools"]])
def test_a_build_without_isolation_names_what_is_missing(missing, monkeypatch):
    find_spec, version = importlib.util.find_spec, importlib.metadata.version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    monkeypatch.setattr(build_backend, "_runs", lambda program: program not in missing)

    def version_of(name):
        if name == "setuptools":
            return "69.5.1" if name in missing else "80.9.0"
        if name in missing:
            raise importlib.metadata.PackageNotFoundError
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", version_of)
    requirements = {"setuptools": "'setuptools>=77'", "pybind11": "'pybind11>=2.12'", "ninja": "'ninja'"}
    if not missing:
        build_backend._setuptools()
        return
    with pytest.raises(RuntimeError, match="a build without isolation needs what is missing here") as refused:
        build_backend._setuptools()
    assert f"pip install {' '.join(requirements[name] for name in missing)}` first" in str(refused.value)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_kernels_of_lesser_processors(capability):
    """One build holds the kernels of every instruction set; ATEN_CPU_CAPABILITY limits which are used."""
    tests = ["test_divergence.py", "test_ops.py", "-k", "not large_offsets and not compiles"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    # In this folder: in the root, `-m pytest` would import the source tree instead of the installed package.
    folder = Path(__file__).parent
    done = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout


CLEAN = """
import torch, tdpo_ext
assert tdpo_ext.__file__.startswith({home!r}), tdpo_ext.__file__
logits = torch.randn(4, 11, requires_grad=True)
chosen, rejected = tdpo_ext.token_divergence(logits, torch.randn(4, 11), torch.tensor([1, 2, 3, 4])).chunk(2)
tdpo_ext.tdpo_loss(chosen, rejected).mean().backward()
print("grad", logits.grad.abs().sum().item() > 0)
"""


@pytest.mark.slow
def test_the_wheel_alone_in_a_fresh_environment(tmp_path):
    """Built by pip as a user would, installed into an environment without the source tree, run from elsewhere."""
    built = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT))
    assert built.returncode == 0, built.stderr
    home = tmp_path / "fresh"
    assert run(sys.executable, "-m", "venv", str(home)).returncode == 0
    python = str(home / "bin" / "python")
    wheel = next(tmp_path.glob("*.whl"))
    assert run(python, "-m", "pip", "install", "--no-deps", str(wheel)).returncode == 0
    # This environment's packages, behind the fresh one's own, so that torch need not be installed again.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    (site / "others.pth").write_text(str(Path(torch.__file__).parent.parent))
    done = run(python, "-c", CLEAN.format(home=str(home)), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "grad True"
    with zipfile.ZipFile(wheel) as file:
        names = [name for name in file.namelist() if ".dist-info" not in name]
    assert all(name.endswith((".py", ".so", "py.typed")) for name in names), names


def test_build_info(tmp_path):
    done = run(sys.executable, "-m", "tdpo_ext", cwd=tmp_path)  # outside the source tree
    assert done.returncode == 0, done.stderr
    info = tdpo_ext.build_info()
    assert info["torch"] == torch.__version__
    for name, value in info.items():
        assert f"{name}: {value or 'none'}" in done.stdout


@pytest.mark.parametrize("name", tdpo_ext.__all__)
def test_public_names_are_documented(name):
    assert getattr(tdpo_ext, name).__doc__, f"{name} has no docstring"
