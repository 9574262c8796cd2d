"""A compact trainer for Token-level Direct Preference Optimization on top of `tdpo_ext` and transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TDPOConfig
    from .data import PreferenceCollator, load_preferences, tokenize_preferences
    from .head import LanguageModelHead
    from .reference import ReferenceCache, cache_reference
    from .trainer import TDPOTrainer

_HOMES = {
    "LanguageModelHead": "head",
    "PreferenceCollator": "data",
    "ReferenceCache": "reference",
    "TDPOConfig": "config",
    "TDPOTrainer": "trainer",
    "cache_reference": "reference",
    "load_preferences": "data",
    "tokenize_preferences": "data",
}

__all__ = [
    "LanguageModelHead",
    "PreferenceCollator",
    "ReferenceCache",
    "TDPOConfig",
    "TDPOTrainer",
    "cache_reference",
    "load_preferences",
    "tokenize_preferences",
]


def __getattr__(name: str):
    # On first use only: the command line has settings to make before torch is loaded.
    if name not in _HOMES:
        raise AttributeError(f"module 'tdpo' has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    return globals()[name]
