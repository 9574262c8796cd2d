"""The results of the experiment, printed, saved and drawn."""

from __future__ import annotations

import time
from pathlib import Path

import matplotlib

from ..files import write_json
from .comparison import Difference
from .examples import Example, differing
from .results import EXAMPLES, Results
from .settings import DemoSettings
from .verdict import interval, shown

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def report(settings: DemoSettings, out: Path, results: Results, seconds: float) -> None:
    """Prints the results and writes results.json and frontier.png beside the models."""
    _print_curves(results)
    _print_differences(results)
    print(f"\nVerdict: {results.verdict}")
    print("Intervals are over the prompts, of one training each: another seed trains other policies.")
    _print_examples(results)
    _plot(results, out / "frontier.png")
    times = {"seconds": seconds, "processor_seconds": time.process_time()}
    write_json(out / "results.json", {**results.saved(), **times})
    print(f"\nSaved under {out}:")
    print("  frontier.png, results.json; base/ (where all methods start from); pairs.json (the preference data);")
    names = ", ".join(settings.methods)
    print(f"  {names}: model/, checkpoints/, evaluations.json, log.json. {seconds:.0f} s in all.")


def _print_curves(results: Results) -> None:
    curves = results.curves
    print("\nReward (probability of a positive review) and sequence KL by step")
    header = "".join(f"{method.upper():>8s} reward      kl" for method in curves)
    print(f"{'step':>5s}{header}")
    for points in zip(*curves.values()):
        cells = "".join(f"{point['reward']:>15.3f}{point['kl']:>8.2f}" for point in points)
        print(f"{points[0]['step']:>5d}{cells}")
    print("\nReward at matched KL (interpolated)")
    for row in results.matched_kl:
        cells = "   ".join(f"{method.upper()} {row[method]:.3f}" for method in curves)
        print(f"  KL {row['kl']:5.2f}   {cells}")


def _print_differences(results: Results) -> None:
    print(f"\nDifferences in reward on the same {len(results.prompts)} prompts and random numbers")
    for method, gains in results.gains.items():
        print(f"  {shown(method):>5s} - before, last step      {_figures(gains[-1])}")
    for comparison in results.comparisons:
        pair = f"{shown(comparison.method):>5s} - {shown(comparison.other)}"
        print(f"  {pair}, last step".ljust(31) + _figures(comparison.reward))
        print(f"  {pair}, KL {comparison.matched_kl:.2f}".ljust(31) + _figures(comparison.reward_at_equal_kl))


def _figures(difference: Difference) -> str:
    return (
        f"{difference.value:+.3f}   {interval(difference)}   standard error {difference.error:.3f} "
        f"(unpaired {difference.unpaired_error:.3f})"
    )


def _print_examples(results: Results) -> None:
    print("\nSamples, each with its reward")
    if results.comparisons:
        differ, prompts = differing(results.examples), len(results.prompts)
        print(f"The methods' texts differ for {differ} of {prompts} prompts; such are shown first.")
    for example in results.examples[:EXAMPLES]:
        print(f"\n  {_one_line(example.prompt)} ...")
        for names, reward, text in _lines(example):
            print(f"  {names:>{_width(results)}s} {reward:.2f}  {text}")


def _lines(example: Example) -> list[tuple[str, float, str]]:
    """The distinct continuations of a prompt, with the names of all who wrote them."""
    return [(_together(each.names), each.reward, _one_line(each.text)) for each in example.continuations]


def _width(results: Results) -> int:
    """Of the names in the samples that are printed."""
    return max(len(names) for example in results.examples[:EXAMPLES] for names, _, _ in _lines(example))


def _together(names: list[str]) -> str:
    return " = ".join(map(shown, names))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _plot(results: Results, path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method, gains in results.gains.items():
        kls = [point["kl"] for point in results.curves[method]]
        line = left.plot(kls, [0, *(gain.value for gain in gains)], marker="o", label=shown(method))[0]
        bars = [[gain.value - gain.low for gain in gains], [gain.high - gain.value for gain in gains]]
        left.errorbar(kls[1:], [gain.value for gain in gains], bars, fmt="none", color=line.get_color(), capsize=3)
    left.set(
        xlabel="sequence KL(reference || policy), nats",
        ylabel="gain in reward, P(positive)",
        title="Gain over the start, held-out prompts",
    )
    left.legend()
    rows = [
        (f"{shown(each.method)} - {shown(each.other)}\n{where}", difference)
        for each in results.comparisons
        for where, difference in (
            ("last step", each.reward),
            (f"KL {each.matched_kl:.2f}", each.reward_at_equal_kl),
        )
    ]
    for height, (_, each) in enumerate(rows):
        right.plot([each.low, each.high], [height, height], color="black")
        right.plot(each.value, height, marker="o", color="black" if each.clear else "white", markeredgecolor="black")
    right.set_yticks(range(len(rows)), [name for name, _ in rows])
    right.axvline(0, color="gray", linestyle="--")
    right.set(xlabel="difference in reward", title="Differences (filled: the interval excludes 0)")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.locator_params(axis="x", nbins=6)
    figure.suptitle(f"95% intervals over {len(results.prompts)} prompts, equal random numbers", fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)
