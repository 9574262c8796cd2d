"""Runs what `make virtual-gpu` runs, stage by stage, and prints a table: `python run.py [--nightly]`.

Streams run late and fresh memory is NaN (virtual_gpu/settings.py). With --nightly, the tests run in guard pages and in
a random order of threads too, and more random batches.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.prefix) / "bin"
SWITCHES = {"VIRTUAL_GPU_DEVICES": "2", "VIRTUAL_GPU_LATE": "1", "VIRTUAL_GPU_POISON": "1", "OMP_NUM_THREADS": "1"}
ON_CUDA = {"TDPO_TEST_DEVICE": "cuda"}
LIBRARY = "tests/library/"
TRAINER = "tests/trainer/"


@dataclass(frozen=True)
class Stage:
    """Tests, by pytest's arguments, and the variables that they run with beside the usual ones."""

    name: str
    tests: tuple[str, ...]
    variables: dict[str, str] = field(default_factory=dict)


STAGES = [
    Stage("CUDA tests", ("-m", "cuda", "tests/library", "tests/trainer/loss")),
    Stage("memory of 80 GB", ("-m", "cuda", f"{LIBRARY}test_cuda_memory.py"), {"VIRTUAL_GPU_MEMORY": str(80 << 30)}),
    Stage("logs and rehearsal", ("tests/virtual_gpu",)),
    Stage(
        "any batch, any plan",
        (f"{LIBRARY}test_any_batch.py", "-k", "not sharded"),
        {**ON_CUDA, "HYPOTHESIS_PROFILE": "virtual-gpu"},
    ),
    Stage(
        "the library's tests",
        tuple(
            f"{LIBRARY}test_{name}.py"
            for name in ("losses", "per_token", "reverse_kl", "references", "token_loss", "without_reference")
        ),
        ON_CUDA,
    ),
    Stage(
        "the trainer's tests",
        (
            f"{TRAINER}test_trainer.py",
            f"{TRAINER}reference/test_at_start.py",
            f"{TRAINER}reference/test_cache.py",
            f"{TRAINER}reference/test_without_adapters.py",
            f"{TRAINER}models/test_adapters.py",
            f"{TRAINER}models/test_causal_lm.py",
            f"{TRAINER}loss/test_preference_loss.py",
            f"{TRAINER}loss/test_budgets.py",
            f"{TRAINER}data/test_shared_prompts.py",
            f"{TRAINER}test_evaluation.py",
        ),
        ON_CUDA,
    ),
    Stage("two processes by gloo", ("-k", "ddp and not split", f"{TRAINER}test_trainer_distributed.py"), ON_CUDA),
]
NIGHTLY = [
    Stage(
        "guard pages",
        ("-m", "cuda", f"{LIBRARY}test_cuda_divergence.py", f"{LIBRARY}test_cuda_linear.py"),
        {"VIRTUAL_GPU_GUARD": "1", "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    ),
    Stage(
        "random order of threads",
        ("-m", "cuda", f"{LIBRARY}test_cuda_divergence.py", f"{LIBRARY}test_cuda_linear.py"),
        {"VIRTUAL_GPU_ORDER": "random"},
    ),
    Stage(
        "2,000 batches",
        (f"{LIBRARY}test_any_batch.py", "-k", "not sharded"),
        {**ON_CUDA, "HYPOTHESIS_PROFILE": "virtual-gpu-nightly"},
    ),
]


def run(stage: Stage) -> bool:
    """Whether all of a stage's tests pass; prints how many there were, and the output where one fails."""
    began = time.monotonic()
    command = [BIN / "pytest", "-o", "addopts=--strict-markers --import-mode=importlib", "-q", "-n", "2"]
    done = subprocess.run(
        [*map(str, command), "--dist", "loadfile", *stage.tests],
        cwd=ROOT,
        env={**os.environ, **SWITCHES, **stage.variables},
        capture_output=True,
        text=True,
    )
    counts = re.findall(r"\d+ (?:passed|failed|skipped|errors?)", done.stdout)
    print(f"{stage.name:<26s} {', '.join(counts):<40s} {time.monotonic() - began:4.0f} s", flush=True)
    if done.returncode != 0:
        print(done.stdout[-20_000:], done.stderr[-5_000:], sep="\n")
    return done.returncode == 0


def main() -> None:
    began = time.monotonic()
    stages = STAGES + (NIGHTLY if "--nightly" in sys.argv else [])
    passed = [run(stage) for stage in stages]
    bugs = subprocess.run([sys.executable, ROOT / "tests/virtual_gpu/planted_bugs.py"], env={**os.environ, **SWITCHES})
    print(f"in {time.monotonic() - began:.0f} s")
    raise SystemExit(0 if all(passed) and bugs.returncode == 0 else 1)


if __name__ == "__main__":
    main()
