"""The tables of what was tried to break: the soak, and the mutation scores."""

from __future__ import annotations

from .pages import load, markdown, table


@table
def reliability() -> str:
    """Counts of the soak."""
    soak = load("soak")
    rows = []
    for result in soak["fuzz"]:
        cases = result["cases"]
        counted = (
            f"{cases['token_divergence']:,} of logits, {cases['linear losses']:,} of hidden states, "
            f"{cases['batches']:,} batches of pairs"
        )
        rows.append([f"fuzzed calls, {result['capability']}", counted, f"{len(result['failures'])} wrong"])
    for name, counts in soak["trainer"].items():
        if "killed" in counts:
            outcome = f"all {counts['finished, identical']} finished runs identical"
            rows.append([name, f"{counts['killed']} times", outcome])
        else:
            total = counts["detected"] + counts["harmless"] + counts["wrong"]
            outcome = f"{counts['detected']} detected, {counts['harmless']} harmless, {counts['wrong']} wrong"
            rows.append([name, f"{total} times", outcome])
    for ranks, count in soak["sharded faults"].items():
        rows.append([f"sharded faults, {ranks}", f"{count} faults", "each reached every rank"])
    return markdown(["what", "how often", "outcome"], rows)


@table
def mutation_scores() -> str:
    """How many of a module's mutants its tests notice."""
    rows = []
    for name, counts in load("mutations")["modules"].items():
        share = counts["noticed"] / counts["mutants"]
        rows.append([f"`{name}`", *(f"{counts[key]:,}" for key in ("mutants", "noticed", "not_run")), f"{share:.0%}"])
    return markdown(["module", "mutants", "noticed", "not run by these tests", "score"], rows)
