"""Which kernels compute: the compiled ones on their devices, those in plain torch on every other.

TDPO_KERNELS=torch takes the latter everywhere; "compiled", the default, takes the compiled ones where there are any.
"""

from __future__ import annotations

import functools
import warnings

import torch

from ._load import wanted_kernels


def has_compiled_kernels(device_type: str) -> bool:
    """Whether a device of this type has compiled kernels in this process."""
    key = torch._C._dispatch_key_for_device(device_type)
    return torch._C._dispatch_has_kernel_for_dispatch_key("tdpo_ext::row_states", key)


def describe() -> str:
    """The kernels of each type of device."""
    if wanted_kernels() == "torch":
        return "torch on every device (TDPO_KERNELS=torch)"
    compiled = [device for device in ("cpu", "cuda") if has_compiled_kernels(device)]
    return f"compiled on {' and '.join(compiled)}, torch on every other device"


def warn_once(device: torch.device) -> None:
    """Says, once for every type of device, that kernels in plain torch are in use and what compiled ones would gain."""
    _warn(device.type)


@functools.cache
def _warn(device_type: str) -> None:
    name = "ROCm" if device_type == "cuda" and torch.version.hip else device_type
    if wanted_kernels() == "torch":
        reason, compiled = "TDPO_KERNELS=torch", "Compiled kernels, where this build has them,"
    elif name == "cuda":
        reason = "this build has no CUDA kernels"
        compiled = "CUDA kernels, which `TDPO_CUDA=1 pip install .` builds (docs/building.md),"
    else:
        reason, compiled = f"there are no compiled kernels for {name}", "Compiled kernels, as CPUs and CUDA have them,"
    warnings.warn(
        f"tdpo_ext: kernels in plain torch compute on {name}: {reason}. {compiled} give the same values in one pass "
        "over the logits, without temporaries.",
        stacklevel=3,
    )
