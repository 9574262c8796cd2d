"""The command `tdpo`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from dataclasses import fields
from typing import Any

from ..extras import MissingExtra, missing_extra
from ..version import package_version
from .values import nearest

_COMMANDS = {
    "train": "train a policy on preference pairs",
    "data": "show what will be trained on: rows kept and dropped, lengths, tokens",
    "memory": "say what a training will need and whether it fits, without loading weights",
    "audit": "compare the loss on your model and data with plain arithmetic",
    "evaluate": "metrics of a policy against a reference",
    "cache-reference": "run the reference once and cache its hidden states",
    "demo": "the paper's controlled-sentiment experiment at small scale",
}
_DESCRIPTIONS = {
    "train": "Trains a policy on preference pairs; run again, it resumes from its last checkpoint.",
    "data": "Shows what will be trained on: how many rows are kept, and why others are dropped; their lengths; and the "
    "first pairs, token by token. Takes the options of training, but reads no weights and writes no file.",
    "memory": "Says what a training will need: bytes of weights, gradients, optimizer, reference, activations and the "
    "loss, beside those of the published code and of TRL; and the longest responses that fit a GPU. Takes the options "
    "of training; of the model it reads the configuration alone, and no data.",
    "audit": "Compares the loss of two pairs with plain arithmetic, as training does before its first step, and prints "
    "what it found. Takes the options of training; nothing is trained or written.",
    "evaluate": "Evaluates a policy against a reference on preference pairs; prints the metrics as JSON.",
    "cache-reference": "Runs the reference over the preferences and caches its hidden states in reference_cache "
    "(default: reference-cache in output_dir), from which training with --precompute_reference reads them. "
    "Interrupted, it resumes when run again.",
}


def _demo(arguments: list[str]) -> None:
    from ..demo.settings import FROM_SCRATCH, SCRATCH, DemoSettings
    from .help import HELP_FLAGS, print_options
    from .known import of_class
    from .parse import read_flags

    if HELP_FLAGS.keys() & set(arguments):
        print_options(
            "tdpo demo [--OPTION VALUE ...]",
            "Reproduces the controlled-sentiment experiment of arXiv 2404.11999 at small scale, on IMDb reviews: a "
            "classifier as reward, preference pairs sampled from SmolLM2, then DPO, TDPO1 and TDPO2 with LoRA from the "
            "same start. Interrupted, it resumes from the last finished stage or checkpoint when run again.",
            f"With --model scratch the defaults are {', '.join(f'{k} {v}' for k, v in SCRATCH.items())}.",
            {"Settings": fields(DemoSettings)},
            hyphens=True,
        )
        raise SystemExit(0)
    given = read_flags("demo", arguments, of_class(DemoSettings))
    defaults = SCRATCH if given.get("model") == FROM_SCRATCH else {}
    settings = DemoSettings(**{**defaults, **given})
    from ..demo.experiment import run

    run(settings)


def _run(command: str, arguments: list[str]) -> None:
    if command == "demo":
        return _demo(arguments)
    from ..options import MemoryOptions, ShowOptions
    from .parse import read_options

    without_device: dict[str, Any] = {"data": ShowOptions, "memory": MemoryOptions}
    own = {"data_options": without_device[command], "needs_device": False} if command in without_device else {}
    given = read_options(command, _DESCRIPTIONS[command], arguments, **own)
    from .checks import check_command

    check_command(command, given)
    from ..progress import library_bars, shows_bars  # loads transformers,
    from . import commands  # and torch, for which what was found until here need not wait

    run = {
        "train": commands.train,
        "data": commands.show,
        "memory": commands.memory,
        "audit": commands.audit,
        "evaluate": commands.evaluate,
        "cache-reference": commands.cache,
    }
    options = given.options()
    with library_bars(shown=shows_bars(options.training)):
        run[command](options)


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status: 2 for bad input, 1 for a run that failed, 130 for an interrupted one."""
    # Small models spend their time in short parallel regions; threads that spin between them take each other's cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not sys.stderr.isatty():  # a file, where every state of a bar stays
        os.environ.setdefault("TQDM_MININTERVAL", "5")
    parser = argparse.ArgumentParser(
        prog="tdpo",
        usage="tdpo COMMAND ...",
        description="Token-level Direct Preference Optimization.",
        epilog="commands:\n"
        + "\n".join(f"  {name:<16s} {summary}" for name, summary in _COMMANDS.items())
        + "\n\n`tdpo COMMAND --help` documents the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", metavar="COMMAND")
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    arguments = sys.argv[1:] if arguments is None else arguments
    first = parser.parse_args(arguments[:1])
    try:
        if first.version:
            print(f"tdpo {package_version()}")
            return 0
        if first.command is None:
            raise ValueError(f"a command is needed: {', '.join(_COMMANDS)}")
        if first.command not in _COMMANDS:
            known = nearest(first.command, _COMMANDS) or f"; there are {', '.join(_COMMANDS)}"
            raise ValueError(f"unknown command {first.command!r}{known}")
        _run(first.command, arguments[1:])
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command again to resume.", file=sys.stderr)
        return 130
    except SystemExit as ended:
        if ended.code == 128 + signal.SIGTERM:  # raised by stopping.Terminated
            print("\nTerminated; run the same command again to resume.", file=sys.stderr)
        raise
    except (ValueError, MissingExtra) as error:
        print(f"tdpo: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = missing_extra(error)
        if missing is None:
            raise
        print(f"tdpo: {missing}", file=sys.stderr)
        return 2
    except ImportError as error:  # of what transformers needs for an option
        print(f"tdpo: {error}", file=sys.stderr)
        return 2
    except (FloatingPointError, RuntimeError, OSError) as error:
        print(f"tdpo: {error}", file=sys.stderr)
        return 1
    return 0
