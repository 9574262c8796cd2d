"""The build: the C++ tests, the errors of a broken installation, and the wheel in a fresh environment."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import build_backend
import pybind11
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
    copy_without(tmp_path, "_C.*", "_brgemm.*", "_built_with.*")
    message = import_error(tmp_path)
    assert message.startswith("ImportError: tdpo_ext is not built here")
    assert "pip install ." in message


def as_built_with(tmp_path, **changes):
    """A copy of the package, with other values in _built_with.py."""
    copy = copy_without(tmp_path)
    values = {"TORCH": "2.13.0", "OLDEST_TORCH": "2.11", "CUDA": ""} | changes
    (copy / "_built_with.py").write_text("".join(f"{name} = {value!r}\n" for name, value in values.items()))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"OLDEST_TORCH": "2.100"}, ["built for torch 2.100 and newer", "pip install 'torch>=2.100'"]),
        ({"CUDA": "3.1"}, ["kernels for CUDA 3.1", "pip install"]),
    ],
    ids=["an older torch", "kernels for another CUDA"],
)
def test_import_where_the_build_does_not_fit(changes, said, tmp_path):
    as_built_with(tmp_path, **changes)
    message = import_error(tmp_path)
    assert torch.__version__ in message
    for part in said:
        assert part in message


WITHOUT_BRGEMM = """
import json, sys, torch
sys.meta_path = [f for f in sys.meta_path if "Editable" not in repr(f)]
import tdpo_ext
hidden, weight, labels = torch.randn(6, 16).bfloat16(), torch.randn(40, 16).bfloat16(), torch.arange(6)
values = tdpo_ext.linear_token_divergence(hidden, weight, hidden.flip(0), weight, labels)
logits = hidden.double() @ weight.double().t()
exact = tdpo_ext.eager.token_divergence(logits, logits.flip(0), labels)
print(json.dumps([tdpo_ext.build_info()["brgemm"], (values.kl - exact.kl).abs().max().item()]))
"""


@pytest.mark.parametrize("torch_built_with", ["2.3.1+cu121", None])
def test_the_optional_module_is_left_out_and_that_is_said(tmp_path, torch_built_with, monkeypatch):
    monkeypatch.setenv("TDPO_KERNELS", "compiled")  # the other kernels do without it anyway
    if torch_built_with is None:
        copy_without(tmp_path, "_brgemm.*")
    else:
        as_built_with(tmp_path, TORCH=torch_built_with)
        (tmp_path / "tdpo_ext" / "_brgemm.so").touch()  # a wheel has none; loading this one would fail
    done = run(sys.executable, "-c", WITHOUT_BRGEMM, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    described, error = json.loads(done.stdout)
    assert described == ("not built" if torch_built_with is None else f"left out: built for torch {torch_built_with}")
    assert error < 1e-4


def test_the_operators_use_the_stable_abi_alone():
    """Of torch's libraries the module needs functions of the C interface only, none of C++."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    (module,) = PACKAGE.glob("_C.*.so")
    needed = run("nm", "--dynamic", "--undefined-only", "--demangle", str(module)).stdout
    symbols = [line.split(maxsplit=1)[1] for line in needed.splitlines()]
    assert not [name for name in symbols if re.match(r"(vtable for |typeinfo for )?(at|c10|torch|caffe2)::", name)]
    assert any(name.startswith("aoti_torch_") for name in symbols)


def test_pybind11_and_torch_never_meet(tmp_path):
    """Torch's include directory holds a pybind11 too, which does not compile where TORCH_TARGET_VERSION is defined."""
    torch_include, build = str(tmp_path / "include"), tmp_path / "build"
    settings = {
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "TDPO_TORCH_INCLUDE": torch_include,
        "TDPO_TORCH_LIB": tmp_path,
        "Python_EXECUTABLE": sys.executable,
        "PYBIND11_FINDPYTHON": "ON",
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    done = run("cmake", "-S", ROOT, "-B", build, *(f"-D{name}={value}" for name, value in settings.items()))
    assert done.returncode == 0, done.stderr
    compiled = {}
    for entry in json.loads((build / "compile_commands.json").read_text()):
        seen = compiled.setdefault(str(Path(entry["file"]).relative_to(ROOT / "csrc")), set())
        for name in (torch_include, pybind11.get_include(), "TORCH_TARGET_VERSION"):
            seen |= {name} if name in entry["command"] else set()
    operators = {torch_include, "TORCH_TARGET_VERSION"}
    assert compiled == {
        "module.cpp": {pybind11.get_include()},
        "ops.cpp": operators,
        "check_operators.cpp": operators,
        "cpu/operators.cpp": operators,
        "cpu/memory.cpp": operators,
        "cpu/row_kernels.cpp": set(),
        "cpu/brgemm.cpp": {torch_include},
    }


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
        build_backend._check_environment()
        return
    with pytest.raises(SystemExit, match="a build without isolation needs what is missing here") as refused:
        build_backend._check_environment()
    assert f"pip install {' '.join(requirements[name] for name in missing)}` first" in str(refused.value)


@pytest.mark.parametrize("activated", [True, False])
def test_a_build_in_an_environment_of_its_own_finds_the_activated_torch(tmp_path, activated):
    """As uv builds: its own environment is activated, and the user's comes after it on the PATH."""
    for name in ("own", "users"):
        assert run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / name)).returncode == 0
    site = next((tmp_path / "users").glob("lib/python*/site-packages"))
    (site / "torch.pth").write_text(str(Path(torch.__file__).parent.parent))
    path = [str(tmp_path / name / "bin") for name in (["own", "users"] if activated else ["own"])]
    environment = {"PATH": os.pathsep.join([*path, "/usr/bin", "/bin"]), "VIRTUAL_ENV": str(tmp_path / "own")}
    code = "import build_backend; print(build_backend._find_torch())"
    environment["PYTHONPATH"] = str(Path(build_backend.__file__).parent)
    done = run(str(tmp_path / "own" / "bin" / "python"), "-c", code, env=environment, cwd=tmp_path)
    assert done.stdout.strip() == str(activated), done.stderr


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
@pytest.mark.usefixtures("building_alone")
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
