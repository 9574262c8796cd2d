"""The tables of the sentiment experiments: the demo, and the paper's frontier."""

from __future__ import annotations

from .pages import load, markdown, table


@table
def demo() -> str:
    """The demo's rewards at matched KL."""
    results = load("demo")
    methods = list(results["curves"])
    rows = [[f"{row['kl']:.2f}", *(f"{row[method]:.3f}" for method in methods)] for row in results["matched_kl"]]
    start = next(iter(results["curves"].values()))[0]
    table = markdown(
        ["sequence KL", *map(str.upper, methods)], [["0 (before)", *[f"{start['reward']:.3f}"] * 3], *rows]
    )
    minutes = results["processor_seconds"] / 60
    return f"{table}\n\n{results['verdict']} This run took {minutes:.1f} minutes of processor time."


@table
def demo_samples() -> str:
    """What the demo's models write, with its reward."""
    examples = load("demo")["examples"]
    rows = []
    for name, continued in examples.items():
        cells = [f"{' '.join(text.split())} ({reward:.2f})" for _, text, reward in continued[:2]]
        rows.append([name if name == "before" else name.upper(), *cells])
    prompts = [f"{' '.join(prompt.split())} ..." for prompt, _, _ in examples["before"][:2]]
    return markdown(["", *prompts], rows)


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
