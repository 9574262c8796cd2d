"""A compact trainer for Token-level Direct Preference Optimization on top of `tdpo_ext` and transformers."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import TDPOConfig
    from .data import PreferenceCollator, tokenize_preferences
    from .head import LanguageModelHead
    from .trainer import TDPOTrainer

__all__ = ["LanguageModelHead", "PreferenceCollator", "TDPOConfig", "TDPOTrainer", "tokenize_preferences"]

_HOMES = {
    "LanguageModelHead": "head",
    "PreferenceCollator": "data",
    "TDPOConfig": "config",
    "TDPOTrainer": "trainer",
    "tokenize_preferences": "data",
}


def __getattr__(name: str):
    # On first use only: the command line has settings to make before torch is loaded.
    if name not in _HOMES:
        raise AttributeError(f"module 'tdpo' has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
