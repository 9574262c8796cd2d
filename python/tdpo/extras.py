"""The extras of `pip install 'tdpo_ext[...]'`: which packages they bring, and the sentence where one is missing.

Free of torch and of every extra.
"""

from __future__ import annotations

from importlib.util import find_spec

# The packages of an extra, as they are imported; and the extras that it includes.
PACKAGES = {
    "train": ("transformers", "datasets", "accelerate", "yaml"),
    "peft": ("peft",),
    "trl": ("trl",),
    "gguf": ("gguf",),
    "engines": ("deepspeed", "bitsandbytes"),
    "plot": ("matplotlib",),
    "demo": ("sklearn",),
}
INCLUDES = {
    "train": (),
    "peft": ("train",),
    "trl": ("peft",),
    "gguf": ("train",),
    "engines": ("peft",),
    "plot": ("train",),
    "demo": ("peft", "gguf", "plot"),
}
_WHAT = {
    "train": "the trainer needs",
    "peft": "adapters need",
    "trl": "tdpo.trl needs",
    "gguf": "GGUF files need",
    "engines": "DeepSpeed and 4-bit weights need",
    "plot": "pictures need",
    "demo": "the demo needs",
}
_EXTRA_OF = {package: extra for extra, packages in PACKAGES.items() for package in packages}


class MissingExtra(ImportError):
    """A package that an extra installs is missing; the message says which extra."""

    def __init__(self, extra: str) -> None:
        super().__init__(f"{_WHAT[extra]} more packages: pip install 'tdpo_ext[{extra}]'")


def require_extra(extra: str) -> None:
    """Raises MissingExtra unless the packages of an extra, and of those that it includes, are installed."""
    if any(find_spec(package) is None for package in _packages(extra)):
        raise MissingExtra(extra)


def require_package(package: str) -> None:
    """Raises MissingExtra unless a package is installed; the message names its extra."""
    if find_spec(package) is None:
        raise MissingExtra(_EXTRA_OF[package])


def missing_extra(error: ModuleNotFoundError) -> MissingExtra | None:
    """What an import's failure comes from, where an extra has the module."""
    extra = _EXTRA_OF.get((error.name or "").partition(".")[0])
    return None if extra is None else MissingExtra(extra)


def _packages(extra: str) -> list[str]:
    return [*PACKAGES[extra], *(package for included in INCLUDES[extra] for package in _packages(included))]
