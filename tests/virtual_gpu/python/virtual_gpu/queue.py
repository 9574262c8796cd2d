"""Work of Python in the queues of the runtime's streams (runtime/interface.cpp)."""

from __future__ import annotations

import atexit
import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import torch

_ILLEGAL_ADDRESS = 700
_callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_runtime = ctypes.CDLL(None)
_runtime.virtual_gpu_submit.argtypes = [
    *(ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p),
    *(_callback, _callback, ctypes.c_void_p),
]
_runtime.virtual_gpu_waits.argtypes = _runtime.virtual_gpu_run.argtypes = [ctypes.c_int, ctypes.c_void_p]
_runtime.virtual_gpu_log.argtypes = [ctypes.c_char_p]

_works: dict[int, tuple[str, Callable[[], Any]]] = {}
_numbers = itertools.count(1)
_ended = False


def _stream(device: int) -> int:
    return torch._C._cuda_getCurrentRawStream(device)


def waits(device: int) -> bool:
    """Whether work that is submitted now runs later."""
    return bool(_runtime.virtual_gpu_waits(device, _stream(device)))


def submit(device: int, name: str, work: Callable[[], Any]) -> None:
    """Runs `work` in the order of the device's current stream."""
    if not waits(device):
        work()
        return
    number = next(_numbers)
    _works[number] = name, work
    _runtime.virtual_gpu_submit(device, _stream(device), name.encode(), _run, _drop, number)


def run(device: int) -> None:
    """Runs all that the device's current stream holds."""
    _runtime.virtual_gpu_run(device, _stream(device))


def log(line: str) -> None:
    """Adds a line to the log (`VIRTUAL_GPU_LOG`)."""
    _runtime.virtual_gpu_log(line.encode())


def forget_errors() -> None:
    """Forgets the errors of kernels, which otherwise stay for as long as the process lives."""
    _runtime.virtual_gpu_forget_errors()


@_callback
def _run(number: int) -> None:
    if _ended:
        return
    name, work = _works[number]
    try:
        with torch.no_grad():
            work()
    except BaseException as error:  # nothing can be raised into the runtime
        print(f"virtual GPU: {name}: {type(error).__name__}: {error}", flush=True)
        _runtime.virtual_gpu_fail(_ILLEGAL_ADDRESS)


@_callback
def _drop(number: int) -> None:
    if not _ended:
        _works.pop(number, None)


@atexit.register
def _end() -> None:
    global _ended
    _ended = True
