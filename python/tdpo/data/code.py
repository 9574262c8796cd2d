"""What the caches of `datasets` must go by beside their inputs: they know functions by name alone."""

import hashlib
from importlib.metadata import version
from pathlib import Path

_PACKAGES = ("transformers", "tokenizers", "jinja2")


def _digest() -> str:
    sources = (file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))
    return hashlib.sha256(b"".join([*sources, *(version(name).encode() for name in _PACKAGES)])).hexdigest()


# Of the code that makes tokens of rows: this package's, and that of the libraries that it calls.
CODE = _digest()
