"""A virtual GPU: torch's CUDA operators check, allocate and launch; the work of their kernels is done on the CPU.

`tests/virtual_gpu/set_up.py` makes an environment in which torch finds it; torch then calls `install`.
"""

from __future__ import annotations


def install() -> None:
    """Called by torch at the end of its import."""
    from .settings import SETTINGS

    if SETTINGS.devices > 0:
        from .aten import install_operators

        install_operators()
