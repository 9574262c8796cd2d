"""Whether a build has CUDA kernels, with which nvcc, and what it requests of the package index for them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import build_backend
import build_cuda
import pytest

TOOLS = Path(build_cuda.__file__).parent


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine without nvcc and without settings; returns a function that sets torch's CUDA release and the GPUs."""
    for name in ("TDPO_CUDA", "TDPO_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(build_cuda.sys, "path", [str(tmp_path / "site-packages")])
    monkeypatch.setattr(build_backend, "_find_torch", lambda: True)

    def describe(torch_cuda, gpus=(), **settings):
        monkeypatch.setattr(build_backend, "installed_torch", lambda: (tmp_path, "2.14.1", torch_cuda))
        monkeypatch.setattr(build_cuda, "visible_architectures", lambda: list(gpus))
        for name, value in settings.items():
            monkeypatch.setenv(name, value)

    return describe


def requested():
    return [name for name in build_backend.get_requires_for_build_wheel() if name.startswith("cuda")]


COMPILER = "cuda-toolkit[nvcc,cudart,cccl]"


@pytest.mark.parametrize(
    ("torch_cuda", "gpus", "settings", "expected"),
    [
        ("13.0", [90], {}, [f"{COMPILER}==13.0.*"]),
        ("13.2", [80, 90], {}, [f"{COMPILER}==13.2.*"]),
        ("13.0", [], {}, []),
        ("13.0", [], {"TDPO_CUDA": "1"}, [f"{COMPILER}==13.0.*"]),
        ("13.0", [], {"TDPO_CUDA_ARCHS": "90"}, [f"{COMPILER}==13.0.*"]),
        ("13.0", [90], {"TDPO_CUDA": "0"}, []),
        ("12.8", [90], {}, []),
        ("13.0", [75], {}, []),
        (None, [90], {}, []),
        (None, [90], {"TDPO_CUDA_ARCHS": "90"}, []),
        (None, [], {"TDPO_CUDA": "1"}, [f"{COMPILER}>=13"]),
    ],
)
def test_what_is_requested(machine, torch_cuda, gpus, settings, expected):
    machine(torch_cuda, gpus, **settings)
    assert requested() == expected


@pytest.mark.parametrize(("gpus", "expected"), [([90], [f"{COMPILER}>=13"]), ([], [])])
def test_what_is_requested_together_with_torch(machine, monkeypatch, gpus, expected):
    machine(None, gpus)
    monkeypatch.setattr(build_backend, "_find_torch", lambda: False)
    assert "torch>=2.11" in build_backend.get_requires_for_build_wheel()
    assert requested() == expected


@pytest.mark.parametrize(
    ("torch_cuda", "gpus", "settings", "said"),
    [
        (None, [90], {}, "CPU only (torch is not a CUDA build)"),
        ("13.0", [], {}, "CPU only (no GPU is visible; `TDPO_CUDA=1 pip install .` builds CUDA kernels all the same)"),
        ("13.0", [90], {"TDPO_CUDA": "0"}, "CPU only (TDPO_CUDA=0)"),
        ("12.8", [90], {}, "install the CUDA toolkit 12.8 and set CUDA_HOME"),
        ("13.0", [70, 75], {}, "CPU only (the CUDA kernels are for GPUs from sm_80 on; this one is sm_75)"),
    ],
)
def test_why_there_are_no_kernels(machine, torch_cuda, gpus, settings, said):
    machine(torch_cuda, gpus, **settings)
    choice = build_cuda.choose(torch_cuda)
    assert said in str(choice)
    assert build_cuda.cmake_arguments(choice, Path("cuda")) == ["-DTDPO_CUDA=OFF", "-DTDPO_CUDA_VERSION="]


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"TDPO_CUDA": "1"}, "install the CUDA toolkit 12.8"), ({"TDPO_CUDA": "yes"}, "allowed are auto, 0 and 1")],
)
def test_kernels_that_cannot_be_built(machine, settings, said):
    machine("12.8", [90], **settings)
    with pytest.raises(SystemExit, match=said):
        build_backend.get_requires_for_build_wheel()


def test_without_isolation_the_packages_are_named(machine):
    machine("13.0", [90])
    with pytest.raises(SystemExit) as refused:
        build_backend.build_wheel("")
    assert f"'{COMPILER}==13.0.*'" in str(refused.value)
    assert "TDPO_CUDA=0" in str(refused.value)


def make_nvcc(path, release):
    path.parent.mkdir(parents=True)
    path.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.51"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def packaged(tmp_path):
    """The nvcc of NVIDIA's packages, of CUDA 13.0."""
    root = tmp_path / "site-packages/nvidia/cu13"
    (root / "include/cccl").mkdir(parents=True)
    (root / "lib").mkdir()
    (root / "lib/libcudart.so.13").touch()
    return make_nvcc(root / "bin/nvcc", "13.0")


def test_which_nvcc_is_taken(machine, packaged, tmp_path, monkeypatch):
    """CUDA_HOME's, or the one on the PATH, except one of another major release than torch's."""
    machine("13.0")
    assert build_cuda.find_compiler("13.0") == build_cuda.Compiler(packaged, packaged=True)
    assert build_cuda.find_compiler("12.8") is None
    on_path = make_nvcc(tmp_path / "bin/nvcc", "12.8")
    assert build_cuda.find_compiler("13.0").nvcc == packaged
    assert build_cuda.find_compiler("12.6") == build_cuda.find_compiler() == build_cuda.Compiler(on_path)
    by_name = make_nvcc(tmp_path / "toolkit/bin/nvcc", "12.4")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "toolkit"))
    assert build_cuda.find_compiler("12.6") == build_cuda.Compiler(by_name)
    with pytest.raises(SystemExit, match=r"CUDA_HOME, .*, is of CUDA 12.4, and torch of CUDA 13.0"):
        build_cuda.find_compiler("13.0")
    shutil.rmtree(tmp_path / "toolkit")
    assert build_cuda.find_compiler("13.0").nvcc == packaged
    assert build_cuda.find_compiler("12.6").nvcc == on_path


def test_packages_without_the_runtime_are_not_taken(machine, packaged):
    machine("13.0")
    (packaged.parents[1] / "lib/libcudart.so.13").unlink()
    assert build_cuda.find_compiler("13.0") is None


def test_arguments_for_the_packages(machine, packaged, tmp_path):
    """Their path, which is new in every isolated build, is not in CMake's cache; nor are earlier architectures."""
    machine("13.0", [75, 80, 90])
    choice, link = build_cuda.choose("13.0"), tmp_path / "cuda"
    assert str(choice) == f"CPU and CUDA 13.0 (architectures: 80, 90) with {packaged}"
    for _ in range(2):
        arguments = build_cuda.cmake_arguments(choice, link)
        assert link.resolve() == packaged.parents[1]
    assert f"-DCMAKE_CUDA_COMPILER={link}/bin/nvcc" in arguments
    assert f"-DCUDA_cudart_LIBRARY={link}/lib/libcudart.so.13" in arguments
    assert {"-DTDPO_CUDA=ON", "-DTDPO_CUDA_VERSION=13.0", "-DTDPO_CUDA_ARCHS=80;90"} <= set(arguments)
    assert not [argument for argument in arguments if "site-packages" in argument]
    machine("13.0", [80], TDPO_CUDA="1")  # a wheel for others, not for this machine's GPU
    assert "-UTDPO_CUDA_ARCHS" in build_cuda.cmake_arguments(build_cuda.choose("13.0"), link)


DRIVER = """
int cuInit(unsigned flags) { return STATUS; }
int cuDeviceGetCount(int* count) { *count = 3; return 0; }
int cuDeviceGetAttribute(int* value, int attribute, int device) {
  *value = attribute == 75 ? (device == 1 ? 12 : 9) : attribute == 76 ? 0 : -1;
  return 0;
}
"""


@pytest.mark.parametrize(("status", "expected"), [(0, [90, 120]), (100, []), (None, [])])
def test_visible_architectures(tmp_path, status, expected):
    """As CUDA's driver says: one of three devices is another; 100 is its error where there is none."""
    compiler = shutil.which("cc") or pytest.skip("no C compiler")
    if status is not None:
        (tmp_path / "driver.c").write_text(DRIVER)
        command = [compiler, "-shared", f"-DSTATUS={status}", "-o", "libcuda.so.1", "driver.c"]
        subprocess.run(command, cwd=tmp_path, check=True)
    elif build_cuda.visible_architectures():
        pytest.skip("this machine has a GPU")
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(TOOLS)}
    code = "import build_cuda; print(build_cuda.visible_architectures())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == str(expected), done.stderr


@pytest.mark.parametrize("archs", ["70", "8.0,9.0", "90;75", "ninety"])
def test_architectures_that_are_none(machine, archs):
    machine("13.0", [90], TDPO_CUDA_ARCHS=archs)
    with pytest.raises(SystemExit, match="TDPO_CUDA_ARCHS is"):
        build_cuda.choose("13.0")
