"""What is installed, for bug reports."""

import sys

import torch

from .ops import matmul, operators, selection


def build_info() -> dict[str, str]:
    """Versions and capabilities of this build and of the torch it runs in.

    Keys: version, torch, torch_built_with, torch_oldest (the oldest release that this build loads in), python,
    compiler, cpu_capability (the kernels chosen at run time; obeys ATEN_CPU_CAPABILITY), cuda_archs (of the CUDA
    kernels; empty where there are none), kernels (which devices have compiled ones and which use those in plain torch;
    TDPO_KERNELS=torch makes it all) and brgemm (dtypes whose CPU products the optional module computes, or why it
    computes none: a wheel has no such module, and one built for another torch is left out).
    """
    return {
        **operators.compiled.build_info(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "kernels": selection.describe(),
        "brgemm": matmul.describe_brgemm(),
    }
