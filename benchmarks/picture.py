"""Draws benchmarks/results/summary.png, the figure of the README, from benchmarks/results/bench_linear.json.

python benchmarks/picture.py
"""

from __future__ import annotations

import matplotlib
from table_kit import ROOT, load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NAMES = {
    "published, eager": "eager",
    "published, compiled": "torch.compile",
    "trl divergence and log-probabilities": "TRL's streamed kernels",
    "liger chunked jsd": "Liger chunked JSD",
    "tdpo_ext streaming": "tdpo_ext streaming",
    "tdpo_ext chunked": "tdpo_ext",
}


def main() -> None:
    figure, axes = plt.subplots(1, 2, figsize=(10, 3), layout="constrained", sharey=True)
    for index, step in enumerate(load("bench_linear")["steps"]):
        rows = {row["candidate"]: row for row in step["candidates"]}
        shown = [name for name in NAMES if name in rows]
        places = [place + 0.38 * (1 - index) for place in range(len(shown))]
        for axis, key in zip(axes, ("over_products", "extra_mb")):
            values = [rows[name][key] for name in shown]
            bars = axis.barh(places, values, height=0.36, label=step["dtype"], color=("#8ab6d6", "#1b5e8c")[index])
            axis.bar_label(bars, fmt="%.2f" if key == "over_products" else "%.0f", padding=3, fontsize=8)
        axes[0].set_yticks([place + 0.19 for place in range(len(shown))], [NAMES[name] for name in shown])
    axes[0].axvline(1, color="black", lw=0.8, ls=":")
    axes[0].set_title("time, relative to the four matrix products alone", fontsize=10)
    axes[1].set_title("MiB beyond inputs and gradients", fontsize=10)
    axes[1].legend(loc="upper right", fontsize=8)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.savefig(ROOT / "benchmarks" / "results" / "summary.png", dpi=130)


if __name__ == "__main__":
    main()
