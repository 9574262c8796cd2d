"""A picture of a run: what its log says of loss, accuracy, margins and KL."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..extras import require_package
from .log_history import Entry, of_evaluations, of_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PANELS = {
    "loss": ("loss",),
    "accuracy": ("rewards/accuracies",),
    "margin": ("rewards/margins",),
    "KL, nats": ("kl/chosen", "kl/rejected"),
}
_COLOURS = ("tab:blue", "tab:red")  # of a panel's metrics
_STYLES = (".-", "o", "s", "^", "D", "v")  # of training, and of evaluation sets


def plot_log(log_history: Sequence[Entry], figure: Figure | None = None) -> Figure:
    """Draws loss, accuracy, margin, and the KL of chosen and rejected responses, step by step.

    Lines are training, points evaluations. What the log lacks is left out, as the KL of a loss without a reference is.

    Args:
        log_history: `trainer.state.log_history`, or that of a trainer_state.json; of `tdpo.trl.TDPOTrainer` too.
        figure: is drawn on, such as one of `matplotlib.pyplot` (default: a new one, which pyplot does not know).

    Returns:
        The figure, to save (`savefig`) or change.

    Raises:
        MissingExtra: matplotlib is not installed.
        ValueError: the log holds no entry of training or evaluation.
    """
    require_package("matplotlib")
    from matplotlib.figure import Figure

    series = {"": of_training(log_history), **of_evaluations(log_history)}
    logged = {name for entries in series.values() for entry in entries for name in entry}
    panels = {
        title: names
        for title, names in _PANELS.items()
        if logged & {prefix + name for prefix in series for name in names}
    }
    if not panels:
        raise ValueError("the log holds no entry of training or evaluation; one is made every logging_steps")
    if figure is None:
        figure = Figure(figsize=(3 * len(panels), 2.6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        for name, colour in zip(names, _COLOURS):
            side = name.split("/")[-1] if len(names) > 1 else ""
            for (prefix, entries), style in zip(series.items(), itertools.cycle(_STYLES)):
                points = [(entry["step"], entry[prefix + name]) for entry in entries if prefix + name in entry]
                if points:
                    label = " ".join(filter(None, [side, prefix.rstrip("_")])) or "training"
                    axes.plot(*zip(*points), style, color=colour, markersize=4, label=label)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        if len(axes.lines) > 1:
            axes.legend(fontsize="small")
    return figure
