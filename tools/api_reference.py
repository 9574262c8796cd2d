"""Writes the API reference to docs/api, from the docstrings of the installed tdpo_ext and tdpo.

python tools/api_reference.py
"""

import inspect
import typing
from pathlib import Path
from types import ModuleType

import pdoc
import tdpo

import tdpo_ext


def resolve_named_tuples(module: ModuleType) -> None:
    """Replaces the string annotations of a module's named tuples by the types they name.

    typing.NamedTuple copies a class's annotations to a `__new__` that lives in a module of its own, where pdoc can't
    look the names up.
    """
    for name in module.__all__:
        value = getattr(module, name)  # also imports it: the names of tdpo are loaded on first use
        if inspect.isclass(value) and issubclass(value, tuple) and hasattr(value, "_fields"):
            value.__new__.__annotations__ = typing.get_type_hints(value)


def main() -> None:
    for module in (tdpo_ext, tdpo):
        resolve_named_tuples(module)
    # By path: in the root, the name `tdpo_ext` could also mean the source tree.
    packages = [Path(inspect.getfile(module)).parent for module in (tdpo_ext, tdpo)]
    pdoc.pdoc(*packages, output_directory=Path(__file__).parent.parent / "docs" / "api")


if __name__ == "__main__":
    main()
