"""What the benchmarks share: interleaved timing, peak memory, and results as JSON with the machine described."""

from __future__ import annotations

import json
import platform
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

import tdpo_ext

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """The machine and the software that a result was measured with."""
    names = {"model name": "unknown"}
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            names.setdefault(key.strip(), value.strip())
            if key.strip() == "model name":
                names["model name"] = value.strip()
    return {
        "cpu": names["model name"],
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "platform": platform.platform(terse=True),
        **tdpo_ext.build_info(),
    }


def save(name: str, content: dict) -> Path:
    """Writes benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **content}, indent=1) + "\n")
    return path


def medians(
    candidates: dict[str, Callable[[], object]], rounds: int, prepare: Callable[[], object] = lambda: None
) -> dict[str, float]:
    """Median seconds of each candidate, taken in turn so that a slow spell of the machine meets all of them.

    `prepare` runs before each, outside the timing: what one candidate left behind is not the next one's to clear.
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for index in range(rounds + 1):
        for name, run in candidates.items():
            prepare()
            start = time.perf_counter()
            run()
            if index > 0:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(series) for name, series in times.items()}


def peak_extra_bytes(run: Callable[[], object]) -> int:
    """Resident memory at its peak during `run`, beyond what was resident before, sampled every millisecond."""
    process = psutil.Process()
    tdpo_ext.release_scratch()
    before = process.memory_info().rss
    peak, done = before, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, process.memory_info().rss)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak - before


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as aligned text."""
    cells = [columns] + [
        [f"{row[c]:.3g}" if isinstance(row[c], float) else str(row[c]) for c in columns] for row in rows
    ]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)
