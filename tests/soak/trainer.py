"""Kills training and caching at random moments, and damages their files at random.

    python tests/soak/trainer.py [--kills 100] [--damages 1000] [--seed 0] [--json RESULTS]

A killed run is started again until it finishes, and its result must be bitwise that of an unbroken run. A damaged file
must be detected, by an error that names it, or be harmless: what is read is what was written. Prints the counts; exits
with 1 if anything differs. `--kills 20 --damages 200` takes half a minute.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# One thread: forks are safe, and results repeat.
os.environ.update({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})
sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import torch
import transformers
from tdpo import ReferenceCache, cache_reference, tokenize_preferences
from tdpo.files import MANIFEST, check_manifest, digest, file_digest
from tdpo.reference import cache as reference_cache
from tdpo.runs import checkpoints

from helpers.damage import random_damage
from helpers.forked import run_forked
from helpers.model_families import make_model, make_tokenizer
from helpers.trainer_cases import losses, make_preferences, make_trainer

SIGNALS = (signal.SIGKILL, signal.SIGTERM)
reference_cache._SHARD_ROWS = 8  # more moments at which a run can resume


def make_tokens(rows=160):
    return tokenize_preferences(make_preferences(rows), make_tokenizer(), 40, 16)


def train(folder):
    """Trains, or resumes training; the losses and the weights' digest."""
    out = Path(folder, "out")
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3, "weight_decay": 0.1}
    trainer = make_trainer(out, ref_model=make_model("gpt2", 1), **options)
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=bool(checkpoints.checkpoints_of(out)))
    return [losses(trainer), digest(*(value.numpy() for value in trainer.model.state_dict().values()))]


def fill_cache(folder):
    """Fills the cache, or resumes filling it; its digest."""
    cache_reference(Path(folder, "cache"), make_model("gpt2"), make_tokens(), 0, "float32", batch=4)
    return [file_digest(path) for path in sorted(Path(folder, "cache").glob("*"))]


def soak_kills(run, kills, generator, folder):
    """Kills `run` at random moments until that many signals have struck; the counts."""
    started = time.monotonic()
    unbroken = run_forked(run, folder / "unbroken").result
    duration = time.monotonic() - started
    counts, part = Counter(), 0
    while counts["killed"] < kills or (folder / str(part)).exists():
        home = folder / str(part)
        home.mkdir(exist_ok=True)
        kind = generator.choice(SIGNALS) if counts["killed"] < kills else None
        after = (kind, generator.uniform(0, duration)) if kind else None
        outcome = run_forked(run, home, signal_after=after)
        if kind and outcome.status == -kind:
            counts.update(["killed", kind.name])
            continue
        same = outcome.status == 0 and outcome.result == unbroken
        counts["finished, identical" if same else "finished, DIFFERENT"] += 1
        shutil.rmtree(home)
        part += 1
    return dict(counts)


class CacheTarget:
    """A cache, finished or not; what a reader sees after damage must be what was written."""

    def __init__(self, folder, finished):
        self.folder, self.model, self.tokens = folder, make_model("gpt2"), make_tokens(24)
        cache_reference(folder, self.model, self.tokens, 0)
        self.intact = self._read()
        if not finished:
            self._interrupt()
        self.finished = finished

    def _interrupt(self):
        shutil.rmtree(self.folder)
        states, calls = reference_cache._states, []

        def interrupted(*arguments):
            calls.append(1)
            if len(calls) == 3:
                raise KeyboardInterrupt
            return states(*arguments)

        reference_cache._states = interrupted
        with contextlib.suppress(KeyboardInterrupt):
            cache_reference(self.folder, self.model, self.tokens, 0)
        reference_cache._states = states

    def _read(self):
        cache = ReferenceCache.open(self.folder, self.model, self.tokens, "bfloat16")
        return [cache.hidden(row, side) for row in range(len(self.tokens)) for side in ("chosen", "rejected")]

    def harmless(self, path):
        if not self.finished:
            cache_reference(self.folder, self.model, self.tokens, 0)
        return all(map(torch.equal, self._read(), self.intact))

    def names(self, path, message):
        return str(self.folder) in message


class CheckpointTarget:
    """Two checkpoints, of which the newer is damaged."""

    def __init__(self, folder):
        trainer = make_trainer(folder, max_steps=2, save_strategy="steps", save_steps=1)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        self.out, self.folder = folder, folder / "checkpoint-2"
        self.manifest = json.loads((self.folder / MANIFEST).read_text())

    def harmless(self, path):
        if checkpoints.last_checkpoint(self.out) == str(self.out / "checkpoint-1"):
            check_manifest(self.folder)  # says what is wrong
        return json.loads((self.folder / MANIFEST).read_text()) == self.manifest

    def names(self, path, message):
        return str(path) in message


def soak_damage(target, damages, generator):
    """Damages one file of the target at a time; the counts, and what went wrong."""
    pristine = target.folder.with_name("pristine")
    shutil.copytree(target.folder, pristine)
    counts, wrong = Counter(detected=0, harmless=0, wrong=0), []
    for _ in range(damages):
        path = generator.choice(sorted(file for file in target.folder.rglob("*") if file.is_file()))
        done = random_damage(path, generator)
        try:
            outcome = "harmless" if target.harmless(path) else "wrong"
        except ValueError as error:
            outcome = "detected" if target.names(path, str(error)) else "wrong"
        except Exception as error:
            outcome, done = "wrong", f"{done}: {error!r}"
        counts[outcome] += 1
        if outcome == "wrong":
            wrong.append(done)
        shutil.rmtree(target.folder)
        shutil.copytree(pristine, target.folder)
    return {**counts, "what": wrong}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="signals, half of them at training")
    parser.add_argument("--damages", type=int, default=1000, help="damaged files, half of them of checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    generator, results = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, run in {"training": train, "caching": fill_cache}.items():  # before this process computes anything
            (folder / name).mkdir()
            results[f"{name} killed"] = soak_kills(run, options.kills // 2, generator, folder / name)
        targets = {
            "checkpoint damaged": (CheckpointTarget(folder / "a" / "out"), options.damages // 2),
            "cache damaged": (CacheTarget(folder / "b" / "cache", finished=True), options.damages // 4),
            "unfinished cache damaged": (CacheTarget(folder / "c" / "cache", finished=False), options.damages // 4),
        }
        for name, (target, damages) in targets.items():
            results[name] = soak_damage(target, damages, generator)
    text = json.dumps(results, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)
    failed = any(counts.get("wrong") or counts.get("finished, DIFFERENT") for counts in results.values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
