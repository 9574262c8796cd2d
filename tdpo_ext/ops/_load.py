"""Loads the compiled module, or says in one sentence why it can't."""

import importlib

import torch


def _release(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


def load():
    """The compiled module.

    Raises:
        ImportError: it was never built, or it was built for another torch release than the one imported.
    """
    try:
        from .. import _built_with
    except ImportError:
        raise ImportError(
            "tdpo_ext is not built here: its compiled module is missing; run `pip install .` in the source tree "
            "(or leave the source tree, if an installed tdpo_ext was meant)."
        ) from None
    if _release(_built_with.TORCH) != _release(torch.__version__):
        raise ImportError(
            f"tdpo_ext was built for torch {_built_with.TORCH} but torch {torch.__version__} is installed; "
            "run `pip install --force-reinstall --no-deps .` in the source tree to build it for this torch."
        )
    return importlib.import_module("tdpo_ext._C")
