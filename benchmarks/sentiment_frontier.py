"""The paper's controlled-sentiment figures (arXiv 2404.11999, section 5.1): reward over sequence KL, and KL over steps.

    python benchmarks/sentiment_frontier.py [--methods dpo-0.1 tdpo2-0.5 ...] [--seeds 0 1 2] [--report-only] [--tiny]

Every seed has its own classifier split and its own preference pairs, sampled from SmolLM2; every method starts from
SmolLM2 and trains LoRA through the public trainer: DPO at beta 0.05, 0.1, 0.3 and 1; TDPO1; TDPO2 at alpha 0.3, 0.5,
0.7 and 1, at beta 0.1. A (method, seed) pair is a run of its own: it resumes where it was interrupted, and its curves
are added to OUT/runs.json, of which benchmarks/results/frontier.json and .png show means and deviations over seeds. So
runs can be spread over days and processes: on two cores, two processes with OMP_NUM_THREADS=1 and different seeds
finish sooner than one with both threads, and all 27 runs take a little over two hours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from common import RESULTS, save, text_table
from tdpo.demo.evaluation import Point, reward_at
from tdpo.demo.settings import DemoSettings, Method

METHODS = {f"dpo-{beta:g}": Method("dpo", beta, 0.5) for beta in (0.05, 0.1, 0.3, 1.0)}
METHODS |= {"tdpo1": Method("tdpo1", 0.1, 0.5)}
METHODS |= {f"tdpo2-{alpha:g}": Method("tdpo2", 0.1, alpha) for alpha in (0.3, 0.5, 0.7, 1.0)}
SETTINGS = {
    "prompts": 400,
    "response_tokens": 24,
    "steps": 32,
    "eval_every": 8,
    "eval_prompts": 512,
    "kl_prompts": 256,
    "learning_rate": 1e-3,
}
TINY = {"reviews": 1000, "prompts": 12, "steps": 2, "eval_every": 1, "eval_prompts": 4, "response_tokens": 6}
LEVELS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)  # sequence KLs at which rewards are compared
LAST_STEPS = 8  # averaged at the end of a training: a batch is 8 pairs
BASELINE = "dpo-0.1"  # DPO at the beta of all TDPO runs: what every run is compared with, seed by seed
_COLORS = {"dpo": "Blues", "tdpo1": "Greens", "tdpo2": "Reds"}  # darker for a larger beta or alpha
Runs = dict[str, dict[str, dict]]  # method -> seed -> {"frontier": [point], "kl": [step of training]}


def run(experiment, name: str) -> dict:
    """Trains a method unless that is done: its frontier, and the KL of its batches over the steps."""
    frontier = [evaluation.point() for evaluation in experiment.train(name, METHODS[name])]
    log = json.loads((experiment.out / name / "log.json").read_text())
    keys = ("step", "kl/chosen", "kl/rejected", "kl/margin")
    return {"frontier": frontier, "kl": [{key: entry[key] for key in keys} for entry in log if "kl/chosen" in entry]}


def gain_at(points: list[Point], kl: float) -> float | None:
    """What a run's reward has gained over the start at a sequence KL, interpolated; None if it never went that far."""
    if max(point["kl"] for point in points) < kl:
        return None
    return reward_at(points, kl) - points[0]["reward"]


def matched(runs: Runs) -> list[dict]:
    """Mean, standard deviation and number of seeds of every method's gain at each level that it reached.

    Gains, because the seeds start from different rewards: each has its own classifier and prompts.
    """
    rows = []
    for level in LEVELS:
        row: dict = {"kl": level}
        for name, seeds in runs.items():
            gains = [gain_at(results["frontier"], level) for results in seeds.values()]
            reached = [gain for gain in gains if gain is not None]
            if reached:
                row[name] = {"mean": float(np.mean(reached)), "sd": float(np.std(reached)), "seeds": len(reached)}
        rows.append(row)
    return rows


def over_baseline(runs: Runs) -> dict[str, dict[str, float]]:
    """By how much the reward of a run's last evaluation exceeds the baseline's of that seed at the same sequence KL.

    method -> seed -> difference, without the runs that end at a KL which the baseline never reached.
    """
    differences: dict[str, dict[str, float]] = {}
    for name, seeds in runs.items():
        for seed, results in seeds.items():
            points = results["frontier"]
            baseline = runs.get(BASELINE, {}).get(seed)
            there = baseline and gain_at(baseline["frontier"], points[-1]["kl"])
            if there is not None:
                gained = points[-1]["reward"] - points[0]["reward"]
                differences.setdefault(name, {})[seed] = gained - there
    return differences


def mean_and_sd(values: list) -> dict:
    """Of a number, or of each point of a series, over seeds."""
    return {"mean": np.mean(values, 0).tolist(), "sd": np.std(values, 0).tolist()}


def curves_of(seeds: dict[str, dict]) -> dict:
    """What the picture shows of a method: samples over evaluations, and the KL of the training pairs over steps."""
    frontiers = [results["frontier"] for results in seeds.values()]
    logs = [results["kl"] for results in seeds.values()]
    return {
        "seeds": len(seeds),
        "samples_kl": mean_and_sd([[point["kl"] for point in points] for points in frontiers]),
        "gain": mean_and_sd([[point["reward"] - points[0]["reward"] for point in points] for points in frontiers]),
        "steps": [entry["step"] for entry in logs[0]],
        "chosen_kl": mean_and_sd([[entry["kl/chosen"] for entry in log] for log in logs]),
        "rejected_kl": mean_and_sd([[entry["kl/rejected"] for entry in log] for log in logs]),
    }


def end_of(curves: dict) -> dict:
    """What the table shows of a method after its last step."""
    return {
        "gain": {name: values[-1] for name, values in curves["gain"].items()},
        "samples_kl": curves["samples_kl"]["mean"][-1],
        **{name: float(np.mean(curves[name]["mean"][-LAST_STEPS:])) for name in ("chosen_kl", "rejected_kl")},
    }


def plot(curves: dict[str, dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name, means in curves.items():
        variant = METHODS[name].variant
        family = [other for other in METHODS if METHODS[other].variant == variant]
        shade = 0.4 + 0.5 * (family.index(name) + 1) / len(family)
        style = {"color": plt.get_cmap(_COLORS[variant])(shade), "label": name, "ls": "--" if variant == "dpo" else "-"}
        _band(axes[0], means["samples_kl"]["mean"], means["gain"], style)
        for axis, key in ((axes[1], "chosen_kl"), (axes[2], "rejected_kl")):
            _band(axis, means["steps"], means[key], style)
    axes[0].set(xlabel="sequence KL(reference || policy), nats", ylabel="gain in reward, P(positive)", title="samples")
    axes[1].set(xlabel="step", ylabel="sequence KL, nats", title="chosen responses, training pairs")
    axes[2].set(xlabel="step", title="rejected responses, training pairs")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _band(axis, across: list[float], values: dict[str, list[float]], style: dict) -> None:
    """The mean over seeds, and one standard deviation around it."""
    mean, spread = np.array(values["mean"]), np.array(values["sd"])
    axis.plot(across, mean, lw=1.4, **style)
    axis.fill_between(across, mean - spread, mean + spread, color=style["color"], alpha=0.08)


def report(runs: Runs, settings: dict, folder: Path) -> None:
    """Writes frontier.json and frontier.png."""
    ordered = {name: runs[name] for name in METHODS if name in runs}
    curves, rows = {name: curves_of(seeds) for name, seeds in ordered.items()}, matched(ordered)
    if curves:
        plot(curves, folder / "frontier.png")
    results = {
        "settings": settings,
        "methods": {name: method._asdict() for name, method in METHODS.items()},
        "gain_at_matched_kl": rows,
        "baseline": BASELINE,
        "over_baseline": over_baseline(ordered),
        "end": {name: end_of(means) for name, means in curves.items()},
        "curves": curves,
    }
    path = save("frontier", results, folder)
    shown = [{name: cell["mean"] if isinstance(cell, dict) else cell for name, cell in row.items()} for row in rows]
    print(f"{text_table(shown, ['kl', *ordered])}\nsaved {path}", flush=True)


def saved_runs(settings: dict, folder: Path) -> Runs:
    """The runs in runs.json, which must have these settings; none where there is no such file."""
    path = folder / "runs.json"
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    if saved["settings"] != settings:
        raise SystemExit(f"{path} holds runs with other settings, {saved['settings']}: give another --out")
    return saved["runs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/frontier"), help="folder of the runs and of runs.json")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of frontier.json and .png")
    parser.add_argument("--report-only", action="store_true", help="train nothing; report the runs that are there")
    parser.add_argument("--tiny", action="store_true", help="tiny settings: rehearses the script, measures nothing")
    arguments = parser.parse_args()
    settings = TINY if arguments.tiny else SETTINGS
    if arguments.report_only:
        return report(saved_runs(settings, arguments.out), settings, arguments.results)
    from tdpo.demo.experiment import Experiment, quiet_libraries

    with quiet_libraries():
        for seed in arguments.seeds:
            runs = saved_runs(settings, arguments.out)
            missing = [name for name in arguments.methods if str(seed) not in runs.get(name, {})]
            if missing:
                experiment = Experiment(DemoSettings(out=str(arguments.out / f"seed-{seed}"), seed=seed, **settings))
            for name in missing:
                results = run(experiment, name)
                runs = saved_runs(settings, arguments.out)  # again: another process may have added its own
                runs.setdefault(name, {})[str(seed)] = results
                arguments.out.mkdir(parents=True, exist_ok=True)
                (arguments.out / "runs.json").write_text(json.dumps({"settings": settings, "runs": runs}))
                report(runs, settings, arguments.results)


if __name__ == "__main__":
    main()
