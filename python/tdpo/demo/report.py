"""The results of the experiment: a table, a plot, a comparison at matched KL and a few samples."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from ..files import write_json
from .judge import Example
from .settings import METHODS, DemoSettings

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Point = dict[str, float]  # of a frontier: step, reward and kl


def reward_at(points: list[Point], kl: float) -> float:
    """Reward where a method's curve crosses a sequence KL, by interpolation between the nearest evaluations."""
    ordered = sorted(points, key=lambda point: point["kl"])
    return float(np.interp(kl, [point["kl"] for point in ordered], [point["reward"] for point in ordered]))


def matched_kl(curves: dict[str, list[Point]]) -> list[dict[str, float]]:
    """Rewards of all methods at sequence KLs that every curve reaches."""
    reach = min(max(point["kl"] for point in points) for points in curves.values())
    rows = []
    for share in (0.5, 0.75, 1.0):
        kl = share * reach
        rows.append({"kl": kl, **{method: reward_at(points, kl) for method, points in curves.items()}})
    return rows


def _plot(curves: dict[str, list[Point]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for method, points in curves.items():
        axes.plot([p["kl"] for p in points], [p["reward"] for p in points], marker="o", label=method.upper())
    axes.set_xlabel("sequence KL(reference || policy), nats")
    axes.set_ylabel("reward: P(positive)")
    axes.set_title("Reward against KL, samples for held-out prompts")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def verdict(matched: list[dict[str, float]], error: float) -> str:
    """What the rewards at the largest matched KL say of TDPO2 and DPO, in a sentence."""
    last = matched[-1]
    difference = last["tdpo2"] - last["dpo"]
    how = "higher than" if difference > 0 else "not higher than"
    size = "more" if abs(difference) > 2 * error else "less"
    return (
        f"At KL {last['kl']:.2f} the reward of TDPO2 is {how} that of DPO at the same beta ({difference:+.3f}), by "
        f"{size} than two standard errors of the samples ({error:.3f} each)."
    )


def report(settings: DemoSettings, out: Path, examples: dict[str, list[Example]], seconds: float) -> None:
    """Prints the results and writes results.json and frontier.png beside the models."""
    curves = {method: json.loads((out / method / "frontier.json").read_text()) for method in settings.methods}
    print("\nReward (probability of a positive review) and sequence KL by step")
    header = "".join(f"{method.upper():>8s} reward      kl" for method in curves)
    print(f"{'step':>5s}{header}")
    for points in zip(*curves.values()):
        cells = "".join(f"{point['reward']:>15.3f}{point['kl']:>8.2f}" for point in points)
        print(f"{points[0]['step']:>5d}{cells}")

    matched = matched_kl(curves)
    print("\nReward at matched KL (interpolated)")
    for row in matched:
        cells = "   ".join(f"{method.upper()} {row[method]:.3f}" for method in curves)
        print(f"  KL {row['kl']:5.2f}   {cells}")
    results: dict[str, Any] = {"curves": curves, "matched_kl": matched, "examples": examples}
    results |= {"seconds": seconds, "processor_seconds": time.process_time()}
    if {"dpo", "tdpo2"} <= curves.keys():
        error = float(np.hypot(*(curves[method][-1]["reward_error"] for method in ("dpo", "tdpo2"))))
        results["verdict"] = verdict(matched, error)
        print(f"\n{results['verdict']}")

    print("\nSamples, each with its reward")
    for rows in zip(*examples.values()):
        print(f"\n  {_one_line(rows[0].prompt)} ...")
        for name, example in zip(examples, rows):
            shown = name.upper() if name in METHODS else name
            print(f"  {shown:>7s} {example.reward:.2f}  {_one_line(example.continuation)}")

    _plot(curves, out / "frontier.png")
    write_json(out / "results.json", results)
    print(f"\nSaved under {out}:")
    print("  frontier.png, results.json; base/ (where all methods start from); pairs.json (the preference data);")
    print(f"  {', '.join(curves)}: model/, checkpoints/, frontier.json, log.json. {seconds:.0f} s in all.")


def _one_line(text: str) -> str:
    return " ".join(text.split())
