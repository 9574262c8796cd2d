"""The operators, scratch memory and matrix products that the rest of the library is built on.

Internal: the public functions are in `tdpo_ext.divergence`, `tdpo_ext.linear` and `tdpo_ext.losses`.
"""

from . import matmul, memory, operators, selection, torch_kernels

__all__ = ["matmul", "memory", "operators", "selection", "torch_kernels"]
