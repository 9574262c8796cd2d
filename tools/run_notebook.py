"""Runs the code of a notebook, cell after cell, and keeps what it prints and draws as the notebook's outputs.

python tools/run_notebook.py examples/quickstart.ipynb

Each cell is executed in the same namespace, in the notebook's folder, as Jupyter does; Jupyter itself is not needed.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def run(notebook: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same notebook with the outputs of its code; an error of a cell is raised."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cells, count = [], 0
    before, path = Path.cwd(), list(sys.path)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    try:
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                code = compile("".join(cell["source"]), f"cell {count}", "exec")
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(code, namespace)
                outputs = [*_text(printed.getvalue()), *_figures()]
                cell = {**cell, "execution_count": count, "outputs": outputs}
            cells.append(cell)
    finally:
        os.chdir(before)
        sys.path[:] = path
    return {**notebook, "cells": cells}


def _text(printed: str) -> list[dict[str, Any]]:
    if not printed:
        return []
    return [{"output_type": "stream", "name": "stdout", "text": printed.splitlines(keepends=True)}]


def _figures() -> list[dict[str, Any]]:
    """The figures that a cell has drawn, as Jupyter's inline backend shows them; they are closed."""
    outputs = []
    for number in plt.get_fignums():
        drawn = io.BytesIO()
        plt.figure(number).savefig(drawn, format="png", dpi=80)
        data = {"image/png": base64.b64encode(drawn.getvalue()).decode(), "text/plain": ["<Figure>"]}
        outputs.append({"output_type": "display_data", "data": data, "metadata": {}})
    plt.close("all")
    return outputs


def main(path: str) -> None:
    """Rewrites a notebook with its outputs."""
    file = Path(path).resolve()
    done = run(json.loads(file.read_text()), file.parent)
    file.write_text(json.dumps(done, indent=1, ensure_ascii=False) + "\n")
    print(f"ran {path}")


if __name__ == "__main__":
    main(*sys.argv[1:])
