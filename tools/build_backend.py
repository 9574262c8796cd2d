"""The PEP 517 build backend: setuptools, building against the torch already installed in the target environment.

An isolated build hides the installed torch. It would download another one, gigabytes of it and perhaps another
release, and build the extension for that one. This backend asks the target environment's interpreter, outside the
isolation, whether torch is installed. If so, it appends that interpreter's paths after the isolated ones; if not, it
requests torch from the build front end like any other build requirement. Where CUDA kernels are to be built and there
is no nvcc, it requests NVIDIA's (build_cuda.py).

What stops a build is said in one sentence, without a traceback.
"""

import importlib.metadata
import importlib.util
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import build_cuda

TORCH = "torch>=2.11"

_QUERY = """
import importlib.util, json, sys
has_torch = importlib.util.find_spec("torch") is not None
path = [entry for entry in sys.path if entry]
print(json.dumps({"has_torch": has_torch, "path": path, "python": list(sys.version_info[:2])}))
"""


def _target_interpreters() -> list[str]:
    """The interpreters of the environments that may be the target, the likeliest first.

    pip runs the build with the target's interpreter. uv runs it in an environment of its own and activates that one;
    the target, if it was activated, comes after it on the PATH.
    """
    activated = [os.environ.get("VIRTUAL_ENV", ""), *map(os.path.dirname, os.get_exec_path())]
    environments = [folder for folder in activated if folder and os.path.exists(os.path.join(folder, "pyvenv.cfg"))]
    return list(dict.fromkeys([sys.executable, *(os.path.join(folder, "bin", "python") for folder in environments)]))


def _query(interpreter: str) -> dict:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run([interpreter, "-c", _QUERY], env=clean, capture_output=True, text=True, cwd="/")
    if done.returncode != 0:
        return {"has_torch": False}
    return json.loads(done.stdout)


def _find_torch() -> bool:
    """Whether torch can be imported, after adding the target environment's paths if need be."""
    if importlib.util.find_spec("torch") is not None:
        return True
    for interpreter in _target_interpreters():
        target = _query(interpreter)
        if target["has_torch"] and target["python"] == list(sys.version_info[:2]):
            sys.path.extend(entry for entry in target["path"] if entry not in sys.path)
            importlib.invalidate_caches()
            return True
    return False


def _runs(program: str) -> bool:
    """Whether a program is on the PATH and runs: in isolation, a script of the target environment does not."""
    path = shutil.which(program)
    return path is not None and subprocess.run([path, "--version"], capture_output=True).returncode == 0


def _numbers(version: str) -> list[int]:
    """The first two numbers of a version."""
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


def installed_torch() -> tuple[Path, str, str | None]:
    """Torch's folder, its version and its CUDA release, without importing it: that takes seconds, and a torch for
    another processor cannot be imported.

    Raises:
        SystemExit: torch is too old.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    values = runpy.run_path(str(folder / "version.py"))
    version, oldest = str(values["__version__"]), TORCH.removeprefix("torch>=")
    if _numbers(version) < _numbers(oldest):
        raise SystemExit(
            f"tdpo_ext: torch {version} is installed here, and {oldest} or newer is needed: "
            f"run `pip install '{TORCH}'` first."
        )
    return folder, version, values.get("cuda")


def _requirements() -> list[str]:
    requirements = ["setuptools>=77", "pybind11>=2.12", "ninja"]
    if not _runs("cmake"):
        requirements.append("cmake>=3.18")
    if _find_torch():
        cuda = build_cuda.choose(installed_torch()[2])
    else:
        requirements.append(os.environ.get("TDPO_BUILD_TORCH", TORCH))
        cuda = build_cuda.choose(None, torch_known=False)
    return requirements + ([cuda.requirement] if cuda.requirement else [])


def _missing() -> list[str]:
    """What a build needs and this interpreter lacks, as requirements."""
    return [requirement for requirement in _requirements() if not _has(*requirement.split(">="))]


def _has(name: str, least: str = "0") -> bool:
    if name in ("cmake", "ninja"):  # from a package, or any program of that name
        return importlib.util.find_spec(name) is not None or _runs(name)
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return _numbers(version) >= _numbers(least)


def _check_environment() -> None:
    """Raises SystemExit unless all that a build needs is there; in isolation, the front end has installed it."""
    if not _find_torch():
        raise SystemExit(
            "tdpo_ext: this build cannot find an installed torch. Install torch first and, with uv, activate "
            "the environment or pass --no-build-isolation."
        )
    if missing := _missing():
        packages = " ".join(f"'{requirement}'" for requirement in missing)
        without_cuda = ", or set TDPO_CUDA=0 for a build without CUDA kernels" if "cuda" in packages else ""
        raise SystemExit(
            f"tdpo_ext: a build without isolation needs what is missing here: run `pip install {packages}` first, or "
            f"leave out --no-build-isolation{without_cuda}."
        )


def _run(hook: str, folder: str, settings, *arguments):
    """A hook of setuptools, quiet about the files that it copies."""
    _check_environment()
    from setuptools import build_meta

    return getattr(build_meta, hook)(folder, {"quiet": "1", **(settings or {})}, *arguments)


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()


def get_requires_for_build_sdist(config_settings=None):
    return ["setuptools>=77"]


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _run("prepare_metadata_for_build_wheel", metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return _run("prepare_metadata_for_build_editable", metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _run("build_wheel", wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _run("build_editable", wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    from setuptools import build_meta

    return build_meta.build_sdist(sdist_directory, config_settings)
