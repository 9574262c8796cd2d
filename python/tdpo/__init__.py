"""A compact trainer for Token-level Direct Preference Optimization on top of `tdpo_ext` and transformers."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .extras import require_extra
from .version import package_version

if TYPE_CHECKING:  # the same names for type checkers and editors
    from .config import TDPOConfig as TDPOConfig
    from .data.collator import PreferenceCollator as PreferenceCollator
    from .data.load import load_preferences as load_preferences
    from .data.tokenize import tokenize_preferences as tokenize_preferences
    from .models.causal_lm import CausalLM as CausalLM
    from .models.hidden_and_head import LMHead as LMHead
    from .models.hidden_and_head import hidden_and_head as hidden_and_head
    from .models.loading import load_gguf_model as load_gguf_model
    from .models.loading import load_gguf_tokenizer as load_gguf_tokenizer
    from .reference.cache import ReferenceCache as ReferenceCache
    from .reference.cache import cache_reference as cache_reference
    from .runs.curves import plot_log as plot_log
    from .trainer import TDPOTrainer as TDPOTrainer

    __version__: str

_DEFINED_IN = {
    "CausalLM": "models.causal_lm",
    "LMHead": "models.hidden_and_head",
    "PreferenceCollator": "data.collator",
    "ReferenceCache": "reference.cache",
    "TDPOConfig": "config",
    "TDPOTrainer": "trainer",
    "cache_reference": "reference.cache",
    "hidden_and_head": "models.hidden_and_head",
    "load_gguf_model": "models.loading",
    "load_gguf_tokenizer": "models.loading",
    "load_preferences": "data.load",
    "plot_log": "runs.curves",
    "tokenize_preferences": "data.tokenize",
}

__all__ = sorted(_DEFINED_IN)


def __getattr__(name: str) -> Any:
    """Imports a public name on first use: the command line sets environment variables before torch is loaded."""
    if name == "__version__":
        value: Any = package_version()
    elif name in _DEFINED_IN:
        require_extra("train")
        value = getattr(import_module(f".{_DEFINED_IN[name]}", __name__), name)
    else:
        raise AttributeError(f"module 'tdpo' has no attribute {name!r}")
    setattr(sys.modules[__name__], name, value)
    return value
