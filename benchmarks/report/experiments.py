"""The tables of the sentiment experiments: the demo, and the paper's frontier."""

from __future__ import annotations

from .pages import load, markdown, table


@table
def demo() -> str:
    """The demo's rewards, their differences on equal prompts and random numbers, and its verdict."""
    results = load("demo")
    start = next(iter(results["curves"].values()))[0]
    rows = [["before", f"{start['reward']:.3f}", "", "0"]]
    for name, points in results["curves"].items():
        gain, last = results["gains"][name][-1], points[-1]
        rows.append([name.upper(), f"{last['reward']:.3f}", _with_interval(gain), f"{last['kl']:.2f}"])
    methods = markdown(["", "reward", "gain, 95% interval", "sequence KL"], rows)
    rows = []
    for each in results["comparisons"]:
        pair, at_equal_kl = f"{each['method'].upper()} - {each['other'].upper()}", each["reward_at_equal_kl"]
        errors = f"{at_equal_kl['error']:.3f} ({at_equal_kl['unpaired_error']:.3f})"
        equal = f"{_with_interval(at_equal_kl)} at {each['matched_kl']:.2f}"
        rows.append([pair, _with_interval(each["reward"]), equal, errors])
    columns = ["reward of", "after the last step", "at equal KL", "standard error of the latter (unpaired)"]
    seconds = f"{results['processor_seconds'] / 60:.1f} minutes of processor time"
    return (
        f"{methods}\n\n{markdown(columns, rows)}\n\n"
        f"{results['verdict']} One training each, {results['prompts']} prompts, {seconds}."
    )


def _with_interval(difference: dict[str, float]) -> str:
    return f"{difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"


@table
def demo_samples() -> str:
    """What the demo's models write, with its reward; a text that several wrote stands there once."""
    results = load("demo")
    rows = []
    for prompt, continuations in results["examples"][:2]:
        for text, reward, names in continuations:
            authors = ", ".join(name if name == "before" else name.upper() for name in names)
            rows.append([_one_line(f"{prompt} ..."), authors, _one_line(text), f"{reward:.2f}"])
    shown = markdown(["prompt", "written by", "continuation", "reward"], rows)
    differ = results["prompts_with_differing_texts"]
    return f"{shown}\n\nThe methods' texts differ for {differ} of {results['prompts']} prompts; such are shown first."


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


@table
def frontier() -> str:
    """Gain in reward at matched KL, mean and standard deviation over seeds."""
    results = load("frontier")
    levels, seeds = results["gain_at_matched_kl"], max(curves["seeds"] for curves in results["curves"].values())
    rows = []
    for name in results["curves"]:
        cells = []
        for level in levels:
            cell = level.get(name, {"seeds": 0})
            if cell["seeds"] == seeds:
                cells.append(f"{cell['mean']:.3f} ± {cell['sd']:.3f}")
            else:
                cells.append(f"{cell['mean']:.3f} ({cell['seeds']} of {seeds})" if cell["seeds"] else "")
        rows.append([name, *cells])
    return markdown(["sequence KL", *(f"{level['kl']:g}" for level in levels)], rows)


@table
def frontier_end() -> str:
    """Every method after its last step: means over seeds."""
    results = load("frontier")
    rows = []
    for name, end in results["end"].items():
        differences = results["over_baseline"].get(name, {})
        over = ", ".join(f"{difference:+.3f}" for difference in differences.values() if name != results["baseline"])
        kls = [f"{end[key]:.2f}" for key in ("samples_kl", "chosen_kl", "rejected_kl")]
        rows.append([name, *kls, f"{end['gain']['mean']:.3f} ± {end['gain']['sd']:.3f}", over])
    columns = ["KL of samples", "KL of chosen", "KL of rejected", "gain in reward", "over dpo-0.1 at the same KL"]
    return markdown(["", *columns], rows)
