"""The whole soak: fuzz, kills, damaged files and sharded faults; its counts go to benchmarks/results/soak.json.

    python tests/soak/run.py [--cases 50000] [--kills 100] [--damages 1000] [--part "sharded faults"]

Exits with 1 if any part found something wrong. docs/reliability.md shows the counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from common import RESULTS, save  # noqa: E402


def fuzz(cases: int) -> tuple[dict, bool]:
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), "--cases", str(cases)], capture_output=True, text=True, cwd=HERE
    )
    return json.loads(done.stdout.splitlines()[-1])["fuzz"], done.returncode == 0


def trainer(kills: int, damages: int) -> tuple[dict, bool]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trainer.json")
        command = [sys.executable, str(HERE / "trainer.py"), "--kills", str(kills), "--damages", str(damages)]
        done = subprocess.run([*command, "--json", str(path)], cwd=HERE)
        return json.loads(path.read_text()), done.returncode == 0


def sharded_faults() -> tuple[dict, bool]:
    """The faults of tests/library/test_shard_faults.py on 2 and on 4 ranks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "faults.json")
        environment = {**os.environ, "TDPO_FAULT_RANKS": "2,4", "TDPO_FAULT_COUNTS": str(path)}
        command = [sys.executable, "-m", "pytest", "-q", "library/test_shard_faults.py"]
        done = subprocess.run(command, cwd=ROOT / "tests", env=environment)
        return json.loads(path.read_text()), done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=50_000, help="fuzzed calls")
    parser.add_argument("--kills", type=int, default=100, help="kills of training and of caching")
    parser.add_argument("--damages", type=int, default=1000, help="damaged files")
    parser.add_argument("--part", help="repeat this part alone, and keep the others' counts")
    arguments = parser.parse_args()
    parts = {
        "fuzz": lambda: fuzz(arguments.cases),
        "trainer": lambda: trainer(arguments.kills, arguments.damages),
        "sharded faults": sharded_faults,
    }
    counts, failed = {}, []
    if arguments.part:
        counts = json.loads((RESULTS / "soak.json").read_text())
    for name in [arguments.part] if arguments.part else parts:
        counts[name], passed = parts[name]()
        if not passed:
            failed.append(name)
    print(f"saved {save('soak', {name: counts[name] for name in parts})}")
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
