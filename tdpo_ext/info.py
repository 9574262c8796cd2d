"""What is installed, for bug reports."""

import sys

import torch

from .ops import operators


def build_info() -> dict[str, str]:
    """Versions and capabilities of this build and of the torch it runs in.

    Keys: version, torch, torch_built_with, python, compiler, cpu_capability (the kernels chosen at run time; obeys
    ATEN_CPU_CAPABILITY) and cuda_archs (of the CUDA kernels; empty where there are none).
    """
    return {
        **operators.compiled.build_info(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
    }
