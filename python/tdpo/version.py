"""The version of `tdpo_ext` and of `tdpo`, which are installed together."""

from __future__ import annotations

from importlib import import_module


def package_version() -> str:
    """The version as it is installed, without torch; or, in a source tree, as it was built."""
    from importlib import metadata  # takes longer than all else of `import tdpo`

    try:
        return metadata.version("tdpo_ext")
    except metadata.PackageNotFoundError:
        return import_module("tdpo_ext").__version__
