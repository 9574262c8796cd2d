"""The command `tdpo`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any

_COMMANDS = {
    "train": "train a policy on preference pairs",
    "data": "show what will be trained on: rows kept and dropped, lengths, tokens",
    "audit": "compare the loss on your model and data with plain arithmetic",
    "evaluate": "metrics of a policy against a reference",
    "cache-reference": "run the reference once and cache its hidden states",
    "demo": "the paper's controlled-sentiment experiment at small scale",
}
_DESCRIPTIONS = {
    "train": "Trains a policy on preference pairs; run again, it resumes from its last checkpoint.",
    "data": "Shows what will be trained on: how many rows are kept, and why others are dropped; their lengths; and the "
    "first pairs, token by token. Takes the options of training, but reads no weights and writes no file.",
    "audit": "Compares the loss of two pairs with plain arithmetic, as training does before its first step, and prints "
    "what it found. Takes the options of training; nothing is trained or written.",
    "evaluate": "Evaluates a policy against a reference on preference pairs; prints the metrics as JSON.",
    "cache-reference": "Runs the reference over the preferences and caches its hidden states in reference_cache "
    "(default: reference-cache in output_dir), from which training with --precompute_reference reads them. "
    "Interrupted, it resumes when run again.",
}


def _demo(arguments: list[str]) -> None:
    from transformers.hf_argparser import DataClassType, HfArgumentParser

    from ..demo.settings import FROM_SCRATCH, SCRATCH, DemoSettings

    parser = HfArgumentParser(
        DataClassType(DemoSettings),
        prog="tdpo demo",
        description="Reproduces the controlled-sentiment experiment of arXiv 2404.11999 at small scale, on IMDb "
        "reviews: a classifier as reward, preference pairs sampled from SmolLM2, then DPO, TDPO1 and TDPO2 with LoRA "
        "from the same start. Interrupted, it resumes from the last finished stage or checkpoint when run again.",
        epilog=f"With --model scratch the defaults are {', '.join(f'{k} {v}' for k, v in SCRATCH.items())}.",
    )
    if parser.parse_known_args(arguments)[0].model == FROM_SCRATCH:
        parser.set_defaults(**SCRATCH)
    (settings,) = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
    from ..demo.experiment import run

    run(settings)


def _run(command: str, arguments: list[str]) -> None:
    if command == "demo":
        return _demo(arguments)
    from ..options import ShowOptions
    from .parse import parse_options

    own: dict[str, Any] = {"data_options": ShowOptions, "needs_device": False} if command == "data" else {}
    options = parse_options(command, _DESCRIPTIONS[command], arguments, **own)
    from . import commands  # loads torch and transformers, for which `--help` need not wait

    run = {
        "train": commands.train,
        "data": commands.show,
        "audit": commands.audit,
        "evaluate": commands.evaluate,
        "cache-reference": commands.cache,
    }
    run[command](options)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status: 2 for bad input, 1 for a run that failed, 130 for an interrupted one."""
    # Small models spend their time in short parallel regions; threads that spin between them take each other's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = argparse.ArgumentParser(
        prog="tdpo",
        description="Token-level Direct Preference Optimization.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<16s} {summary}" for name, summary in _COMMANDS.items())
        + "\n\n`tdpo COMMAND --help` documents the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=_COMMANDS, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    command = parser.parse_args(arguments[:1]).command
    try:
        _run(command, arguments[1:])
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command again to resume.", file=sys.stderr)
        return 130
    except SystemExit as ended:
        if ended.code == 128 + signal.SIGTERM:  # raised by stopping.Terminated
            print("\nTerminated; run the same command again to resume.", file=sys.stderr)
        raise
    except ValueError as error:
        print(f"tdpo: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, RuntimeError, OSError) as error:
        print(f"tdpo: {error}", file=sys.stderr)
        return 1
    return 0
