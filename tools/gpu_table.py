"""Prints the summary of `gpu_check.sh`: each GPU target beside the last run's measurement."""

import json
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def load(name: str) -> dict:
    """The results of a benchmark; empty if it has not been run."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
    logits, linear = load("bench_logits_cuda"), load("bench_linear_cuda")
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
    print("targets (H200, bfloat16, V 128,256): forward >= 90%, backward >= 88% of the copy; fused <= 1.25x products,")
    print(">= 3x faster than Liger's fused JSD, >= 4x faster than eager, under 2,048 MiB extra")


if __name__ == "__main__":
    main()
