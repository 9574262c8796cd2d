"""The paper's controlled-sentiment figures at small scale: reward over sequence KL, and KL over steps, several seeds.

    python benchmarks/sentiment_frontier.py [--seeds 3] [--out out/frontier] [--report-only]

For every seed, a classifier, a GPT-2 trained from scratch and preference pairs; then DPO, TDPO1 and TDPO2 with alpha
0.1, 0.3, 0.5 and 0.7 from the same initial policy, through the public trainer (arXiv 2404.11999, section 5.1). An
interrupted run resumes from the last checkpoint. Results go to benchmarks/results/sentiment_frontier.json and .png.
Takes about an hour on 2 cores.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from common import RESULTS, save, text_table
from tdpo.demo.report import reward_at
from tdpo.demo.settings import DemoSettings

METHODS = {"dpo": ("dpo", 0.5), "tdpo1": ("tdpo1", 0.5)}
METHODS |= {f"tdpo2-{alpha}": ("tdpo2", alpha) for alpha in (0.1, 0.3, 0.5, 0.7)}
SETTINGS = {"pretrain_steps": 800, "prompts": 1500, "steps": 120, "eval_every": 15, "eval_prompts": 512}


def run(out: Path, seeds: int) -> None:
    from tdpo.demo.experiment import Experiment

    for seed in range(seeds):
        experiment = Experiment(DemoSettings(out=str(out / f"seed-{seed}"), seed=seed, **SETTINGS))
        for name, (variant, alpha) in METHODS.items():
            experiment.train(name, variant, alpha)


def collect(out: Path) -> dict:
    """Every finished run's frontier and KL series: {method: {"frontiers": [seed][point], "kl": [seed][step]}}."""
    curves: dict = {name: {"frontiers": [], "kl": []} for name in METHODS}
    for seed_folder in sorted(out.glob("seed-*")):
        for name, method in curves.items():
            log = seed_folder / name / "log.json"
            if not log.exists():
                continue
            method["frontiers"].append(json.loads((seed_folder / name / "frontier.json").read_text()))
            entries = [entry for entry in json.loads(log.read_text()) if "kl/chosen" in entry]
            method["kl"].append(
                [{key: entry[key] for key in ("step", "kl/chosen", "kl/rejected", "kl/margin")} for entry in entries]
            )
    return curves


def matched(curves: dict) -> list[dict]:
    """Mean and standard deviation over seeds of every method's reward at sequence KLs that all runs reach."""
    largest = min(max(p["kl"] for p in points) for method in curves.values() for points in method["frontiers"])
    rows = []
    for share in (0.4, 0.6, 0.8, 1.0):
        row: dict = {"kl": share * largest}
        for name, method in curves.items():
            rewards = [reward_at(points, share * largest) for points in method["frontiers"]]
            row[name], row[f"{name} sd"] = float(np.mean(rewards)), float(np.std(rewards))
        rows.append(row)
    return rows


def plot(curves: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for index, (name, method) in enumerate(curves.items()):
        kl, reward = (np.array([[p[key] for p in run] for run in method["frontiers"]]) for key in ("kl", "reward"))
        axes[0].plot(kl.mean(0), reward.mean(0), marker="o", ms=3, color=f"C{index}", label=name)
        axes[0].fill_between(
            kl.mean(0), reward.mean(0) - reward.std(0), reward.mean(0) + reward.std(0), color=f"C{index}", alpha=0.12
        )
        steps = [entry["step"] for entry in method["kl"][0]]
        for axis, key in ((axes[1], "kl/chosen"), (axes[2], "kl/rejected")):
            series = np.array([[entry[key] for entry in run] for run in method["kl"]])
            axis.plot(steps, series.mean(0), color=f"C{index}", label=name)
            axis.fill_between(
                steps, series.mean(0) - series.std(0), series.mean(0) + series.std(0), color=f"C{index}", alpha=0.12
            )
    axes[0].set(xlabel="sequence KL(reference || policy), nats", ylabel="reward: P(positive)", title="samples")
    axes[1].set(xlabel="step", ylabel="sequence KL, nats", title="chosen responses, training pairs")
    axes[2].set(xlabel="step", title="rejected responses, training pairs")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="repeat everything with seeds 0, 1, ...")
    parser.add_argument("--out", type=Path, default=Path("out/frontier"), help="output folder of the runs")
    parser.add_argument("--report-only", action="store_true", help="train nothing; report the finished runs")
    arguments = parser.parse_args()
    if not arguments.report_only:
        run(arguments.out, arguments.seeds)
    curves = collect(arguments.out)
    rows = matched(curves)
    print(text_table(rows, list(rows[0])))
    results = {"settings": SETTINGS, "methods": METHODS, "matched_kl": rows, "curves": curves}
    plot(curves, RESULTS / "sentiment_frontier.png")
    print(f"saved {save('sentiment_frontier', results)}")


if __name__ == "__main__":
    main()
