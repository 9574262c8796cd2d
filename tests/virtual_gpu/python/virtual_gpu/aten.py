"""Gives every aten operator that has a CUDA kernel another, which calls the first and does its work on the CPU.

The first checks, allocates and launches; under the stand-in runtime its launches do nothing. Then the same operator
runs on CPU tensors that lie in the same memory, in the queue of the current stream. This is below autograd and the
dispatcher's other keys, in every thread, and covers calls from C++.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from . import special
from .memory import bytes_on_cpu, device_of, mapped, on_cpu, tensors_in
from .queue import run, submit, waits
from .settings import SETTINGS

# Whose result's shape is the data's: computed on the CPU first, as the real kernel could not know it.
_SHAPED_BY_DATA = {
    *("nonzero", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive", "masked_select"),
}
# No work of a kernel, or the runtime's alone.
_LEFT_ALONE = {
    *("empty.memory_format", "empty_strided", "_local_scalar_dense", "record_stream", "is_pinned", "_pin_memory"),
    *("set_", "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor", "is_set_to"),
    *("resize_", "resize_as_", "_resize_output_", "as_strided", "as_strided_", "_reshape_alias", "view", "view.dtype"),
    *("unfold", "view_as_real", "view_as_complex", "alias", "lift", "_efficientzerotensor", "_fused_sdp_choice"),
    *("_cudnn_init_dropout_state", "_make_dep_token", "_nested_view_from_buffer"),
}
_POISONED = ("empty.memory_format", "empty_strided")
_MOST_POISONED = 1 << 30  # bytes
_UNSUPPORTED = ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn", "cudnn_", "miopen")
_DRAWING = ("native_dropout", "native_dropout.out", "_fused_dropout")  # without a generator among their arguments

_library = torch.library.Library("aten", "IMPL")


def install_operators() -> None:
    """Replaces the CUDA kernels of all operators. Called once, at the end of `import torch`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for full_name in torch._C._dispatch_get_all_op_names():
            namespace, _, name = full_name.partition("::")
            replacement = _replacement(name) if namespace == "aten" else None
            if replacement is not None:
                _library.impl(name, replacement, "CUDA", with_keyset=True, allow_override=True)
    cuda = torch.backends.cuda
    for disable in (cuda.enable_flash_sdp, cuda.enable_mem_efficient_sdp, cuda.enable_cudnn_sdp):
        disable(False)


def _replacement(name: str) -> Any:
    """What takes the place of an operator's CUDA kernel; None if it stays."""
    full_name = f"aten::{name}"
    base, _, overload = name.partition(".")
    has_kernel = name == "copy_" or torch._C._dispatch_has_kernel_for_dispatch_key(full_name, "CUDA")
    poisoned = SETTINGS.poison and name in _POISONED
    if not has_kernel or (name in _LEFT_ALONE and not poisoned):
        return None
    op = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
    if op is None or ("sparse" in base and not base.endswith("_")):
        return None
    if any(value.alias_info is not None and not value.alias_info.is_write for value in op._schema.returns):
        return None  # a view
    if base.startswith(_UNSUPPORTED):
        return _Unsupported(name)
    kernel = torch.library.get_kernel(full_name, "CUDA")
    return _Poisoned(kernel) if poisoned else _OnCPU(name, op, kernel)


class _Unsupported:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, keys: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"virtual GPU: {self.name}")


class _Poisoned:
    """An allocation whose memory is filled with NaN, or with True."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __call__(self, keys: Any, *args: Any, **kwargs: Any) -> Any:
        result = self.kernel.call_boxed(keys, *args, **kwargs)
        if 0 < result.untyped_storage().nbytes() <= _MOST_POISONED:
            memory, value = bytes_on_cpu(result), 1 if result.dtype == torch.bool else 255
            submit(result.device.index, "poison", lambda: memory.fill_(value))
        return result


class _OnCPU:
    """An operator whose work is done on the CPU.

    Args:
        name: without the namespace.
        op: the operator.
        kernel: its own CUDA kernel.
    """

    def __init__(self, name: str, op: Any, kernel: Any) -> None:
        self.name, self.op, self.kernel = name, op, kernel
        self.function = special.SPECIAL.get(name, op)
        arguments = op._schema.arguments
        self.names = [argument.name for argument in arguments]
        self.tensors = {index for index, argument in enumerate(arguments) if str(argument.type) == "Tensor"}
        self.takes_generator = any("Generator" in str(argument.type) for argument in arguments)
        self.shaped_by_data = name.partition(".")[0] in _SHAPED_BY_DATA

    def __call__(self, keys: Any, *args: Any, **kwargs: Any) -> Any:
        device = device_of(args, *kwargs.values())
        seed = self._seed(device, args, kwargs)
        if self.shaped_by_data:
            return self._computed_first(device, args, kwargs)
        result = self.kernel.call_boxed(keys, *self._without_numbers(args), **kwargs)
        device = device_of(result) if device is None else device
        if device is None or (self.name == "copy_" and args[0].device != args[1].device):
            return result  # copies between devices are the runtime's, through temporaries where one is needed
        arguments, options = self._on_cpu(args, kwargs, later=waits(device))
        if isinstance(result, (bool, int, float)):
            run(device)
            return self._compute(arguments, options, seed)
        outs = [on_cpu(out) for out in tensors_in(result) if out.is_cuda]  # the work owns no memory of the device
        tf32 = self.function in special.PRODUCTS and _tf32_is_allowed()

        def work() -> None:
            special.tf32_allowed = tf32
            self._place(self._compute(arguments, options, seed), outs)

        submit(device, self.name, work)
        return result

    def _computed_first(self, device: int | None, args: Any, kwargs: Any) -> Any:
        assert device is not None
        torch.cuda.current_stream(device).synchronize()

        def alias(tensor: Tensor) -> Tensor:
            return on_cpu(tensor) if tensor.is_cuda else tensor

        expected = self.op(*mapped(args, alias), **{name: mapped(value, alias) for name, value in kwargs.items()})

        def place(value: Tensor) -> Tensor:
            out = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=f"cuda:{device}")
            memory = on_cpu(out)
            submit(device, self.name, lambda: memory.copy_(value))
            return out

        return mapped(expected, place)

    def _on_cpu(self, args: Any, kwargs: Any, *, later: bool) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of the work; what lies on the CPU is copied if the work runs later."""

        def convert(tensor: Tensor) -> Tensor:
            if tensor.is_cuda:
                return on_cpu(tensor)
            return tensor.clone() if later else tensor

        arguments = [None if isinstance(value, torch.Generator) else mapped(value, convert) for value in args]
        options = {name: mapped(value, convert) for name, value in kwargs.items() if name != "pin_memory"}
        if "device" in options:
            options["device"] = torch.device("cpu")
        return arguments, options

    def _compute(self, arguments: list[Any], options: dict[str, Any], seed: int | None) -> Any:
        if seed is None:
            return self._call(arguments, options)
        if self.takes_generator:
            generator = self.names.index("generator")
            drawing = torch.Generator("cpu").manual_seed(seed)
            if generator < len(arguments):
                arguments = [*arguments[:generator], drawing, *arguments[generator + 1 :]]
                return self._call(arguments, options)
            return self._call(arguments, {**options, "generator": drawing})
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return self._call(arguments, options)

    def _call(self, arguments: list[Any], options: dict[str, Any]) -> Any:
        try:
            return self.function(*arguments, **options)
        except RuntimeError as error:
            if "Unable to cast" not in str(error):
                raise
            return self.function(*self._without_numbers(arguments), **options)

    def _place(self, expected: Any, outs: list[Tensor]) -> None:
        for index, (out, value) in enumerate(zip(outs, tensors_in(expected), strict=True)):
            # Statistics beside the result may be of another precision on the CPU.
            if out.shape != value.shape or (index == 0 and out.dtype != value.dtype):
                raise RuntimeError(
                    f"{self.name} gives {tuple(out.shape)} {out.dtype} on CUDA but {tuple(value.shape)} {value.dtype} "
                    "on the CPU"
                )
            if out.numel() > 0 and out.data_ptr() != value.data_ptr():
                out.copy_(value)

    def _seed(self, device: int | None, args: Any, kwargs: Any) -> int | None:
        """The seed of what the operator draws, from its generator's state before the call."""
        if device is None or not (self.takes_generator or self.name in _DRAWING):
            return None
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
        generator = given[0] if given else torch.cuda.default_generators[device]
        if generator.device.type != "cuda":
            return 0  # the real kernel refuses it
        return (generator.initial_seed() * 1_000_003 + generator.get_offset() * 7919 + 1) % (1 << 62)

    def _without_numbers(self, args: Any) -> Any:
        """The arguments with tensors for numbers that stand for tensors: Python gets these unwrapped."""
        numbers = {
            index for index in self.tensors if index < len(args) and isinstance(args[index], (int, float, complex))
        }
        if not numbers:
            return args
        like = next((value for value in args if isinstance(value, Tensor)), None)

        def tensor(number: Any) -> Tensor:
            dtype = None if like is None else torch.result_type(like, number)
            return torch.scalar_tensor(number, dtype=dtype, device="cpu")

        return [tensor(value) if index in numbers else value for index, value in enumerate(args)]


def _tf32_is_allowed() -> bool:
    return torch._C._get_fp32_precision_getter("cuda", "matmul") == "tf32"
