"""The PEP 517 build backend: setuptools, building against the torch that the target environment already has.

An isolated build hides the installed torch and would fetch another one, gigabytes large and possibly of another
release, for which the extension would then be built. This backend asks the interpreter it is installing for, outside
the isolation, whether it has torch; if so it appends that interpreter's paths behind the isolated ones, and if not it
asks the front end for torch like for any other requirement.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

_PROBE = """
import importlib.util, json, sys
found = importlib.util.find_spec("torch") is not None
print(json.dumps({"torch": found, "path": [entry for entry in sys.path if entry]}))
"""


def _target_interpreter() -> str:
    # pip builds with the target's own interpreter; uv builds in an environment of its own and says the target's in
    # VIRTUAL_ENV, where one is activated.
    activated = os.path.join(os.environ.get("VIRTUAL_ENV", ""), "bin", "python")
    return activated if "VIRTUAL_ENV" in os.environ and os.path.exists(activated) else sys.executable


def _probe_target() -> dict:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    answer = subprocess.run([_target_interpreter(), "-c", _PROBE], env=clean, capture_output=True, text=True, cwd="/")
    if answer.returncode != 0:
        return {"torch": False, "path": []}
    return json.loads(answer.stdout)


def _torch_in_reach() -> bool:
    if importlib.util.find_spec("torch") is not None:
        return True
    target = _probe_target()
    if not target["torch"]:
        return False
    sys.path.extend(entry for entry in target["path"] if entry not in sys.path)
    importlib.invalidate_caches()
    return True


def _runs(program: str) -> bool:
    """Whether a program is on the PATH and works here: a script of the target environment does not, in isolation."""
    found = shutil.which(program)
    return found is not None and subprocess.run([found, "--version"], capture_output=True).returncode == 0


def _requirements() -> list[str]:
    needed = ["setuptools>=77", "pybind11>=2.12", "ninja"]
    if not _runs("cmake"):
        needed.append("cmake>=3.18")
    if not _torch_in_reach():
        needed.append(os.environ.get("TDPO_BUILD_TORCH", "torch>=2.11"))
    return needed


def _setuptools():
    if not _torch_in_reach():
        raise RuntimeError(
            "tdpo_ext: torch is not installed where this build can see it. Install torch first and, with "
            "uv, activate the environment or pass --no-build-isolation."
        )
    from setuptools import build_meta

    return build_meta


def get_requires_for_build_wheel(config_settings=None):
    return _requirements()


def get_requires_for_build_editable(config_settings=None):
    return _requirements()


def get_requires_for_build_sdist(config_settings=None):
    return ["setuptools>=77"]


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return _setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _setuptools().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _setuptools().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    from setuptools import build_meta

    return build_meta.build_sdist(sdist_directory, config_settings)
