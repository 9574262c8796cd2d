"""`checks`: `tdpo_ext.plain_checks` without the package `tdpo_ext`, which loads torch.

The options are checked by them, on the command line before anything slow is loaded.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING


def _load(package: str, module: str) -> ModuleType:
    """A module of a package that is itself not imported."""
    found = find_spec(package)
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0], f"{module}.py")
    spec = spec_from_file_location(f"{__name__}_{module}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


if TYPE_CHECKING:
    from tdpo_ext import plain_checks as checks
else:
    checks = _load("tdpo_ext", "plain_checks")
