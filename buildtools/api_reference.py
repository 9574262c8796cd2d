"""Writes the API reference to docs/api, from the docstrings of tdpo_ext and tdpo as installed.

python buildtools/api_reference.py
"""

from pathlib import Path

import pdoc
import tdpo

import tdpo_ext

# The names of tdpo are imported on first use: pdoc sees those that were.
for name in tdpo.__all__:
    getattr(tdpo, name)
pdoc.pdoc(tdpo_ext.__name__, tdpo.__name__, output_directory=Path(__file__).parent.parent / "docs" / "api")
