"""`python -m tdpo_ext` prints build_info."""

from . import build_info

for name, value in build_info().items():
    print(f"{name}: {value or 'none'}")
