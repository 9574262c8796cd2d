"""The tables of what GPUs are predicted to take."""

from __future__ import annotations

from .pages import load, markdown, table

_MACHINES = ("H200", "H100")


def _both(values: dict[str, float], form: str) -> str:
    return " / ".join(format(values[machine], form) for machine in _MACHINES)


@table
def modelled_kernels() -> str:
    """The two limits of each row kernel, and its predicted share of a copy."""
    rows = [
        [
            kernel["kernel"],
            f"{kernel['instructions']} ({kernel['special']})",
            str(kernel["registers"]),
            str(kernel["bytes"]),
            f"{kernel['entries_by_instructions'] / 1e12:.2f}",
            _both({name: entries / 1e12 for name, entries in kernel["entries_by_memory"].items()}, ".2f"),
            _both(kernel["of_copy"], ".0%"),
            _both(kernel["disproved_below"], ".0%"),
        ]
        for kernel in load("modelled_times")["kernels"]
    ]
    counted = ["kernel", "instructions an entry (special functions)", "registers", "bytes an entry"]
    limits = ["1e12 entries/s by instructions", "by memory, H200 / H100"]
    return markdown([*counted, *limits, "share of a copy, H200 / H100", "disproved below"], rows)


@table
def modelled_steps() -> str:
    """A fused step by its parts."""
    rows = []
    for step in load("modelled_times")["steps"]:
        machines = {machine: step[machine] for machine in _MACHINES}

        def cell(key: str, form: str = ".1f", machines=machines) -> str:
            return _both({name: parts[key] for name, parts in machines.items()}, form)

        cells = [cell(key) for key in ("products", "row kernels", "dW", "small kernels", "ms")]
        ratios = [cell(key, ".2f") for key in ("of_products", "disproved_above")]
        rows.append([f"{step['rows']:,}", f"{step['vocab']:,}", *cells, *ratios])
    header = ["rows", "V", "products", "row kernels", "dW moved", "small kernels", "step, ms", "over products"]
    return markdown([*header, "disproved above"], rows)


@table
def modelled_plans() -> str:
    """What plans cost beside their products, by the planner's model."""
    rows = [
        [
            f"{step['rows']:,}",
            f"{step['vocab']:,}",
            f"{step['rows_at_a_time']:,}",
            f"{step['dz_rows']:,}",
            f"{step['temporaries'] / 2**30:.1f} GiB",
            f"{step['of_products_by_the_planner']:.2f}",
        ]
        for step in load("modelled_times")["steps"]
    ]
    over = "time over that of the products"
    return markdown(["rows", "V", "rows at a time", "dz kept of", "temporaries", over], rows)
