"""Shared by the benchmarks: interleaved timing, peak memory, and results as JSON with a description of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import json
import os
import platform
import re
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

import tdpo_ext
from tdpo_ext.ops import matmul, torch_kernels

RESULTS = Path(__file__).parent / "results"
SLEEP = 20_000_000  # cycles of a GPU, about 10 ms


def machine() -> dict:
    """The machine and the software of this run."""
    return {
        "cpu": _cpu_model(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(terse=True),
        **tdpo_ext.build_info(),
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return "unknown"


def save(name: str, content: dict, folder: Path = RESULTS) -> Path:
    """Writes NAME.json. Benchmarks call it after every case, so that a run that is cut short loses only the last."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(_readable({"machine": machine(), **content}))
    return path


def _readable(content: dict) -> str:
    """JSON with an entry a line, and series of numbers on one."""
    text = json.dumps(content, indent=1)
    return re.sub(r"\[\n([\d\s.,e+-]+)\]", lambda series: f"[{' '.join(series[1].split())}]", text) + "\n"


@contextlib.contextmanager
def plain_torch_kernels(device: str) -> Iterator[None]:
    """Within, tdpo_ext computes as with TDPO_KERNELS=torch, so that both kinds of kernels alternate in one process."""
    operators = (
        torch_kernels.row_states,
        torch_kernels.merge_row_states,
        torch_kernels.finalize_row_states,
        torch_kernels.logit_gradient_out,
    )
    without_brgemm = mock.patch.multiple(
        matmul, has_brgemm=lambda dtype: False, _rounds_faster=functools.cache(matmul._rounds_faster.__wrapped__)
    )
    with torch.library._scoped_library("tdpo_ext", "IMPL") as library, without_brgemm, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced, and by which
        for operator in operators:
            library.impl(operator.__name__, operator, device.upper())
        yield


def with_torch_kernels(function: Callable, device: str) -> Callable:
    """`function` within `plain_torch_kernels`."""

    def replaced(*arguments, **options):
        with plain_torch_kernels(device):
            return function(*arguments, **options)

    return replaced


def medians(
    candidates: dict[str, Callable[[], object]],
    rounds: int,
    prepare: Callable[[], object] = lambda: None,
    device: str = "cpu",
) -> dict[str, float]:
    """Median seconds of each candidate. Candidates alternate, so that a slow spell of the machine affects all of them.

    `prepare` runs before each, untimed: a candidate does not pay for freeing what the one before it left behind.
    """
    seconds = _cuda_seconds if device == "cuda" else _seconds
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, run in candidates.items():
            prepare()
            elapsed = seconds(run)
            if index > 0:  # the first round is a warm-up
                times[name].append(elapsed)
    return {name: statistics.median(series) for name, series in times.items()}


def processor_medians(candidates: dict[str, Callable[[], object]], rounds: int, prepare: Callable[[], object]) -> dict:
    """As `medians`: seconds of this process's threads together, which other work on the machine hardly changes."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    walls: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            prepare()
            gc.collect()
            start = time.process_time()
            walls[name].append(_seconds(run))
            times[name].append(time.process_time() - start)
    return {name: (statistics.median(walls[name]), statistics.median(times[name])) for name in candidates}


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _cuda_seconds(run: Callable[[], object]) -> float:
    """The GPU sleeps first, so that the host is ahead of it, as it is in a training step."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def runnable(candidates: dict[str, Callable[[], object]]) -> dict[str, Callable[[], object]]:
    """The candidates that run on this machine; for each of the others, the error (usually out of memory) is printed."""
    kept = {}
    for name, run in candidates.items():
        try:
            run()
            kept[name] = run
        except Exception as error:  # a peer may fail in any way
            print(f"skipped: {name}: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return kept


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Peak memory during `run` beyond what was in use before: allocated memory on a GPU, resident memory on the CPU
    (sampled every millisecond)."""
    if device == "cuda":
        return cuda_peaks(run).allocated
    _return_free_memory()
    before = _resident_bytes()
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _resident_bytes())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class CudaPeaks(NamedTuple):
    """Bytes of a GPU beyond what was there before: of tensors, and of what torch's allocator holds for them."""

    allocated: int
    reserved: int


def cuda_peaks(run: Callable[[], object]) -> CudaPeaks:
    """Peak memory of a GPU during `run`, which begins without blocks that earlier runs left."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = CudaPeaks(torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    after = CudaPeaks(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    return CudaPeaks(after.allocated - before.allocated, after.reserved - before.reserved)


def _return_free_memory() -> None:
    """Gives back what earlier runs left: counted as in use before, it would hide as much of the next run's peak."""
    gc.collect()
    tdpo_ext.release_scratch()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def text_table(rows: list[dict], columns: list[str]) -> str:
    """Rows as aligned text."""
    cells = [columns] + [
        [f"{row[c]:.3g}" if isinstance(row.get(c), float) else str(row.get(c, "-")) for c in columns] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)
