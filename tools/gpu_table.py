"""Prints the summary of `gpu_check.sh`: each GPU target beside the last run's measurement.

python tools/gpu_table.py [--results FOLDER] [--device cpu]      (cpu: what a rehearsal wrote)
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def load(folder: Path, name: str) -> dict:
    """The results of a benchmark; empty if it has not been run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    suffix = "_cuda" if arguments.device == "cuda" else ""
    logits, linear = (load(arguments.results, f"bench_{name}{suffix}") for name in ("logits", "linear"))
    if not logits and not linear:
        print("no GPU results yet: run tools/gpu_check.sh on a machine with a GPU")
        return
    print(f"\n{(logits or linear)['machine']['gpu']}")
    for row in logits.get("results", []):
        share = row["of_copy_bandwidth"]
        faster = "  ".join(f"{ratio:.1f}x {name}" for name, ratio in row["faster_than"].items())
        print(
            f"logits {row['rows']} x {row['vocab']} {row['dtype']}: forward {share['forward']:.0%}, backward "
            f"{share['backward in place']:.0%} of the copy's {row['copy_gb_per_s']:.0f} GB/s; {faster}"
        )
    for step in linear.get("steps", []):
        print(f"fused {step['rows']} rows, D {step['width']}, V {step['vocab']} {step['dtype']}:")
        for row in step["candidates"]:
            print(
                f"  {row['candidate']:<40s} {1e3 * row['seconds']:8.2f} ms  {row['over_products']:6.2f}x products  "
                f"{row['extra_mb']:8.0f} MiB extra"
            )
    print("targets, bfloat16, V 128,256: forward >= 85%, backward >= 88% of the copy (H200: 75%, 85%); fused <= 1.15x")
    print(
        "products at 4,096 rows, < 55 ms at 8,192 rows (H100); >= 2x faster than TRL, >= 3x than Liger; < 6 GiB extra"
    )


if __name__ == "__main__":
    main()
