"""The README's pictures: heads and loss in summary.png, training steps in models.png."""

from __future__ import annotations

import matplotlib

from .pages import RESULTS, load

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HEADS = {
    "published, eager": "eager",
    "published, compiled": "torch.compile",
    "trl divergence and log-probabilities": "TRL's streamed kernels",
    "liger chunked jsd": "Liger chunked JSD",
    "tdpo_ext streaming": "tdpo_ext streaming",
    "tdpo_ext chunked": "tdpo_ext",
}
STEPS = {
    "published": "published, padded logits",
    "trl kernels": "TRL's streamed kernels",
    "tdpo, padded": "tdpo, padded",
    "tdpo, packed": "tdpo, packed",
    "tdpo, shared prompts": "tdpo, shared prompts",
    "tdpo, shared prompts, cached reference": "tdpo, and cached reference",
}
Bars = dict[str, dict[str, float]]  # candidate -> column -> value


def bars(groups: dict[str, Bars], names: dict[str, str], columns: dict[str, tuple[str, str]], file: str) -> None:
    """A group of bars in every column's axes; `columns` maps a key of the values to a title and a number format."""
    figure, axes = plt.subplots(1, len(columns), figsize=(10, 3), layout="constrained", sharey=True)
    shown = [name for name in names if any(name in group for group in groups.values())]
    for index, (label, group) in enumerate(groups.items()):
        present = [(place, group[name]) for place, name in enumerate(shown) if name in group]
        places = [place + 0.38 * (1 - index) for place, _ in present]
        for axis, (key, (_, form)) in zip(axes, columns.items()):
            values = [row[key] for _, row in present]
            drawn = axis.barh(places, values, height=0.36, label=label, color=("#8ab6d6", "#1b5e8c")[index])
            axis.bar_label(drawn, fmt=form, padding=3, fontsize=8)
    axes[0].set_yticks([place + 0.19 for place in range(len(shown))], [names[name] for name in shown])
    axes[0].axvline(1, color="black", lw=0.8, ls=":")
    axes[-1].legend(loc="upper right", fontsize=8)
    for axis, (title, _) in zip(axes, columns.values()):
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.savefig(RESULTS / file, dpi=130)


def draw() -> None:
    """Draws both from the results."""
    steps = load("bench_linear")["steps"]
    heads = {step["dtype"]: {row["candidate"]: row for row in step["candidates"]} for step in steps}
    memory = ("MiB beyond inputs and gradients", "%.0f")
    time = ("time, relative to the four matrix products alone", "%.2f")
    bars(heads, HEADS, {"over_products": time, "extra_mb": memory}, "summary.png")
    models = {
        {"smollm2": "SmolLM2, V 49,152", "gemma3": "Gemma 3 270M, V 262,144"}[name]: {
            row["candidate"]: {**row, "relative": 1 / row["faster"]} for row in parts["steps"]
        }
        for name, parts in load("bench_models")["models"].items()
    }
    time = ("processor time of a step, relative to published", "%.2f")
    bars(models, STEPS, {"relative": time, "extra_mb": ("MiB beyond models and gradients", "%.0f")}, "models.png")
