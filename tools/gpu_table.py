"""Prints what `gpu_check.sh` measured, in lines, each prediction (`benchmarks/modelled_times.py`) beside its figure.

python tools/gpu_table.py [--results FOLDER]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def load_facts(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Predictions:
    """Those for one GPU; none for a GPU that has none."""

    def __init__(self, results: dict, gpu: str) -> None:
        self.machine = next((name for name in results["assumptions"]["machines"] if name in gpu), None)
        self.kernels = {kernel["kernel"]: kernel for kernel in results["kernels"]}
        self.steps = {(step["rows"], step["vocab"]): step for step in results["steps"]}

    def of_kernel(self, way: str, case: str) -> str:
        """Of a kernel by its way and its dtypes, of which a forward pass has one."""
        kernel = self.kernels.get(f"{way}, {case.replace(' to bfloat16', '') if way == 'forward' else case}")
        if self.machine is None or kernel is None:
            return ""
        share, least = (kernel[name][self.machine] for name in ("of_copy", "disproved_below"))
        return f" (predicted {share:.0%}, at least {least:.0%})"

    def of_step(self, rows: int, vocab: int) -> str:
        step = self.steps.get((rows, vocab))
        if self.machine is None or step is None:
            return ""
        found = step[self.machine]
        return f"; predicted {found['ms']:.1f} ms, {found['of_products']:.2f}x, at most {found['disproved_above']:.2f}x"


def kernel_line(fact: dict, predictions: Predictions) -> str:
    shares = [f"{way} {share:.0%}{predictions.of_kernel(way, fact['case'])}" for way, share in fact["of_copy"].items()]
    return f"row kernels, {fact['rows']} x {fact['vocab']} {fact['case']}, of a copy: {', '.join(shares)}"


def step_lines(step: dict, predictions: Predictions) -> list[str]:
    shape = "fused, {rows} x {vocab}, D {width} {dtype}".format(**step)
    lines = [shape + predictions.of_step(step["rows"], step["vocab"])]
    for row in step["candidates"]:
        kinds = [kind for kind in ("extra", "reserved") if f"{kind}_mb" in row]
        memory = "".join(f"  {row[f'{kind}_mb']:8.0f} MiB {kind}" for kind in kinds)
        lines.append(
            f"  {row['candidate']:<40s} {1e3 * row['seconds']:8.2f} ms  {row['over_products']:6.2f}x products{memory}"
        )
    return lines


def short(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {short(item)}" for name, item in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def fact_lines(fact: dict, predictions: Predictions) -> list[str]:
    """Nothing of facts that are too long; all of those that have no form of their own."""
    name = fact["fact"]
    if name == "row kernels":
        return [kernel_line(fact, predictions)]
    if name == "fused loss":
        return step_lines(fact, predictions)
    if name in ("machine", "kernels of a step"):
        return []
    values = (f"{key}: {short(value)}" for key, value in fact.items() if key not in ("fact", "after_s"))
    return [f"{name}; {'; '.join(values)}"]


def logits_line(row: dict) -> str:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in row["of_copy_bandwidth"].items())
    faster = ", ".join(f"{ratio:.1f}x {name}'s" for name, ratio in row["faster_than"].items())
    return f"logits, {row['rows']} x {row['vocab']} {row['dtype']}, of a copy: {shares}; speed: {faster}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=BENCHMARKS / "results", help="folder of the results")
    folder = parser.parse_args().results
    facts = load_facts(folder / "facts.jsonl")
    logits, linear = (load(folder / f"bench_{name}_cuda.json") for name in ("logits", "linear"))
    machines = [*(fact for fact in facts if fact["fact"] == "machine"), *(r["machine"] for r in (linear, logits) if r)]
    if not machines:
        print("no GPU results yet: run tools/gpu_check.sh on a machine with a GPU")
        return
    predictions = Predictions(load(BENCHMARKS / "results" / "modelled_times.json"), machines[0]["gpu"])
    print(f"\n{machines[0]['gpu']}, torch {machines[0]['torch']}")
    lines = [line for fact in facts for line in fact_lines(fact, predictions)]
    lines += [line for step in linear.get("steps", []) for line in step_lines(step, predictions)]
    print(*lines, *map(logits_line, logits.get("results", [])), sep="\n")


if __name__ == "__main__":
    main()
