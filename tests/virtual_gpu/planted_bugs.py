"""Builds the extension with one bug after another for the virtual GPU; a test must notice each.

make virtual-gpu                                 among its stages
.venv-virtual-gpu/bin/python tests/virtual_gpu/planted_bugs.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path(sys.prefix)
BUILT_FROM = ("csrc", "tests/cpp", "tests/virtual_gpu", "tdpo_ext", "python", "tools", "CMakeLists.txt")


@dataclass(frozen=True)
class Bug:
    """A change of a source file, and the tests of which one must fail.

    Args:
        old, new: what is replaced, once.
    """

    what: str
    file: str
    old: str
    new: str
    tests: str


CUDA = "tests/library/test_cuda_divergence.py"
BUGS = [
    Bug(
        "kernels run on the default stream",
        "csrc/cuda/operators.cpp",
        "return static_cast<cudaStream_t>(stream);",
        "return nullptr;",
        "tests/virtual_gpu/test_log.py::test_all_work_is_on_the_device_and_the_stream_of_the_call",
    ),
    Bug(
        "kernels run on the current device, not on that of their tensors",
        "csrc/cuda/operators.cpp",
        "const DeviceGuard guard(logits.get_device_index());\n  const auto slices",
        "const auto slices",
        f"{CUDA}::test_second_device",
    ),
    Bug(
        "of several slices only the first is merged",
        "csrc/cuda/operators.cpp",
        "checked.slices, checked.rows,",
        "1, checked.rows,",
        f"{CUDA}::test_as_good_as_eager_on_gpu[3-151936-dtype1]",
    ),
    Bug(
        "the gradient is written 16 bytes late",
        "csrc/cuda/operators.cpp",
        "launch_gradient(inputs.params, gradient.params, stream_of(logits));",
        "auto late = gradient.params;\n"
        "  late.out.data = static_cast<char*>(late.out.data) + 16;\n"
        "  launch_gradient(inputs.params, late, stream_of(logits));",
        f"{CUDA}::test_any_alignment_on_gpu",
    ),
]


def build(tree: Path, site: Path) -> None:
    """Builds the extension of a source tree, again where it was built, and installs it."""
    python = ENVIRONMENT / "bin/python"
    ask = "import torch, pybind11; print(torch.__version__, torch.__path__[0], pybind11.get_cmake_dir())"
    asked = subprocess.run([python, "-c", ask], check=True, capture_output=True, text=True, cwd="/").stdout
    version, torch, pybind11 = asked.split()
    includes = [f"{torch}/include", f"{torch}/include/torch/csrc/api/include"]
    options = {
        "Python_EXECUTABLE": python,
        "pybind11_DIR": pybind11,
        "PYBIND11_FINDPYTHON": "ON",
        "TDPO_VIRTUAL_GPU": "ON",
        "TDPO_BRGEMM": "OFF",
        "TDPO_CUDA_INCLUDE": ENVIRONMENT / "cuda-include",
        "TDPO_TORCH_VERSION": version,
        "TDPO_TORCH_INCLUDE": ";".join(includes),
        "TDPO_TORCH_LIB": f"{torch}/lib",
        "CMAKE_INSTALL_PREFIX": site / "tdpo_ext",
    }
    configure = ["cmake", "-S", tree, "-B", tree / "build", *(f"-D{name}={value}" for name, value in options.items())]
    for command in (configure, ["cmake", "--build", tree / "build", "-j2"], ["cmake", "--install", tree / "build"]):
        subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)


def fails(tests: str, site: Path) -> bool:
    """Whether one of the tests fails with the extension in a folder."""
    switches = {"VIRTUAL_GPU_DEVICES": "2", "VIRTUAL_GPU_LATE": "1", "VIRTUAL_GPU_POISON": "1"}
    environment = {**os.environ, **switches, "PYTHONPATH": str(site)}
    command = [ENVIRONMENT / "bin/pytest", "-x", "-p", "no:cacheprovider", tests]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"planted_bugs.py: {tests}:\n{done.stdout}{done.stderr}")
    return done.returncode == 1


def main() -> None:
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        tree, site = Path(folder, "tree"), Path(folder, "site")
        for name in BUILT_FROM:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tree / name)
        shutil.copytree(ROOT / "tdpo_ext", site / "tdpo_ext")
        shutil.copytree(ROOT / "python/tdpo", site / "tdpo")
        build(tree, site)
        for bug in BUGS:
            if fails(bug.tests, site):
                raise SystemExit(f"planted_bugs.py: {bug.tests} fails without a bug")
        for bug in BUGS:
            source = tree / bug.file
            text = source.read_text()
            if text.count(bug.old) != 1:
                raise SystemExit(f"planted_bugs.py: {bug.file} holds {bug.old!r} {text.count(bug.old)} times, not once")
            source.write_text(text.replace(bug.old, bug.new))
            build(tree, site)
            noticed = fails(bug.tests, site)
            print(f"{'noticed' if noticed else 'MISSED '}  {bug.what}", flush=True)
            missed += [] if noticed else [bug]
            source.write_text(text)
    print(f"{len(BUGS) - len(missed)} of {len(BUGS)} planted bugs noticed")
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
