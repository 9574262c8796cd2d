"""The tables of builds: the optional module, the stable interface, and one wheel in several releases of torch."""

from __future__ import annotations

from .pages import load, markdown, table


@table
def brgemm() -> str:
    """CPU products with and without the optional module."""
    found = load("bench_wheel")
    rows = []
    for dtype, times in found["products"].items():
        for what, each in {**times, "step": found["step"][dtype]}.items():
            ratio = each["without"] / each["with"]
            rows.append([dtype, what, f"{each['with']:,.0f}", f"{each['without']:,.0f}", f"{ratio:.2f}x"])
    return markdown(["dtype", "", "with, ms", "without, ms", "without / with"], rows)


@table
def torches() -> str:
    """One wheel, and builds from source, in several releases of torch."""
    columns = ("torch", "package", "built_with", "passed", "failures", "errors", "skipped")
    rows = [[str(result[name]) for name in columns] for result in load("torches")["results"]]
    return markdown(["torch", "package", "built with torch", "passed", "failed", "errors", "skipped"], rows)


@table
def binary() -> str:
    """Import time and operator calls of either interface, and the sizes of wheels."""
    found = load("bench_wheel")
    rows = [
        [
            name,
            f"{process['import_seconds']:.2f} s",
            *(f"{process['call_microseconds'][call]:.1f}" for call in ("row_states", "logit_gradient_out")),
        ]
        for name, process in found["processes"].items()
    ]
    sizes = {("with CUDA kernels" if "+cu" in name else "CPU"): size for name, size in found["wheel_bytes"].items()}
    said = ", ".join(f"{kind} {size / 1e6:.1f} MB" for kind, size in sorted(sizes.items()))
    header = ["interface", "import, after torch", "`row_states`, one short row, us", "`logit_gradient_out`, us"]
    return markdown(header, rows) + f"\n\nWheels: {said}."
