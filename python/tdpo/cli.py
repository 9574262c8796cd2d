"""The command `tdpo`."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import fields
from typing import Any


def _add_fields(parser: argparse.ArgumentParser, options: type) -> None:
    """A flag for every field of a dataclass, its help and default being the field's own."""
    for field in fields(options):
        default: Any = field.default
        kind = type(default[0]) if isinstance(default, tuple) else type(default)
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=kind,
            nargs="+" if isinstance(default, tuple) else None,
            default=list(default) if isinstance(default, tuple) else default,
            help=f"{field.metadata['help']} (default: %(default)s)",
        )


def _parser() -> argparse.ArgumentParser:
    from .demo.settings import DemoSettings

    parser = argparse.ArgumentParser(prog="tdpo", description="Token-level Direct Preference Optimization.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser(
        "demo",
        help="the paper's controlled-sentiment experiment, in small",
        description="Reproduces the controlled-sentiment experiment of arXiv 2404.11999 in small, on IMDb reviews: "
        "a classifier as reward, a GPT-2 trained from scratch, preference pairs, then DPO, TDPO1 and TDPO2 from the "
        "same start. Interrupted, it goes on from the last finished stage or checkpoint when called again.",
    )
    _add_fields(demo, DemoSettings)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    # Small models spend their time in short parallel regions: threads that spin between them starve each other.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    options = vars(_parser().parse_args(arguments))
    options.pop("command")
    from .demo.experiment import run
    from .demo.settings import DemoSettings

    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in options.items()
    }
    try:
        run(DemoSettings(**values))
    except KeyboardInterrupt:
        print("\nInterrupted; call the same command again to go on from here.", file=sys.stderr)
        return 130
    except ValueError as error:
        print(f"tdpo: {error}", file=sys.stderr)
        return 2
    return 0
