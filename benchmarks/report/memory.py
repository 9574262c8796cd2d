"""The tables of estimates of memory beside measured peaks."""

from __future__ import annotations

from .pages import load, markdown, table

_MODELS = {"smollm2": "SmolLM2", "gemma3": "Gemma 3"}


@table
def memory_calls() -> str:
    """One call of the loss: the plan's bytes, and seven tensors of the published code."""
    rows = [
        [
            _MODELS[call["model"]],
            call["dtype"],
            f"{call['pairs']} x {call['pair rows']:,}" + (", frozen head" if call["frozen"] else ""),
            call["plan"],
            f"{call['estimated_mb']:,.0f}",
            f"{call['measured_mb']:,.0f}",
            f"{call['measured_over']:.2f}",
        ]
        for call in load("bench_memory")["loss"]
    ]
    header = ["head", "dtype", "pairs x rows", "plan", "estimate, MiB", "measured, MiB", "measured over estimate"]
    return markdown(header, rows)


@table
def memory_steps() -> str:
    """Two steps of a training."""
    rows = [
        [
            step["training"] if step["training"].startswith("Gemma") else f"SmolLM2, {step['training']}",
            *(f"{step[key]:,.0f}" for key in ("estimated_mb", "measured_mb")),
            f"{step['measured_over']:.2f}",
        ]
        for step in load("bench_memory")["steps"]
    ]
    return markdown(["training", "estimate, MiB", "measured, MiB", "measured over estimate"], rows)
