"""Loads the compiled modules, or says in one sentence why it can't."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import torch

_BRGEMM = Path(__file__).parents[1] / "_brgemm.so"


def _release(version: str) -> tuple[int, ...]:
    """(X, Y) of a version X.Y.Z+local."""
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def wanted_kernels() -> str:
    """ "torch" or "compiled": the environment's TDPO_KERNELS.

    Raises:
        ValueError: it is something else.
    """
    wanted = os.environ.get("TDPO_KERNELS", "compiled")
    if wanted not in ("compiled", "torch"):
        raise ValueError(f"TDPO_KERNELS is {wanted!r}; allowed are compiled (the default) and torch")
    return wanted


def _built_with():
    try:
        return importlib.import_module("tdpo_ext._built_with")
    except ImportError:
        raise ImportError(
            "tdpo_ext is not built here: its compiled module is missing; run `pip install .` in the source tree "
            "(or leave the source tree, if an installed tdpo_ext was meant)."
        ) from None


def load():
    """The compiled module with the operators.

    Raises:
        ImportError: it was never built, or the torch imported is older than it needs, or of another CUDA release.
        ValueError: TDPO_KERNELS is neither "compiled" nor "torch".
    """
    wanted_kernels()
    built = _built_with()
    if _release(torch.__version__) < _release(built.OLDEST_TORCH):
        raise ImportError(
            f"tdpo_ext was built for torch {built.OLDEST_TORCH} and newer but torch {torch.__version__} is installed; "
            f"run `pip install 'torch>={built.OLDEST_TORCH}'`."
        )
    if built.CUDA and built.CUDA.split(".")[0] != (torch.version.cuda or "").split(".")[0]:
        installed = f"torch {torch.__version__} is for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPUs'}"
        raise ImportError(
            f"tdpo_ext was built with kernels for CUDA {built.CUDA} but {installed}; "
            "run `pip install --force-reinstall --no-deps .` in the source tree to build it for this torch."
        )
    return importlib.import_module("tdpo_ext._C")


def load_brgemm() -> str:
    """Loads the optional module of CPU products (csrc/cpu/brgemm.cpp); returns why not, or "" once it is loaded.

    It uses more of torch than the stable ABI, so another release of torch than that of the build leaves it out.
    """
    if wanted_kernels() == "torch":
        return "left out: TDPO_KERNELS=torch"
    if not _BRGEMM.exists():
        return "not built"
    built = _built_with()
    if _release(torch.__version__) != _release(built.TORCH):
        return f"left out: built for torch {built.TORCH}"
    torch.ops.load_library(_BRGEMM)
    return ""
