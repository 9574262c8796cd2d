"""The model that all methods start from, and what became of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..files import save_model
from ..models.loading import load_gguf_model, load_gguf_tokenizer
from .language_model import pretrain, train_tokenizer
from .settings import FROM_SCRATCH, SMOLLM2, DemoSettings
from .smollm2 import GGUF_FILE, smollm2_folder


def prepare_base(settings: DemoSettings, out: Path, texts: list[str]) -> Path:
    """The folder of the model and its tokenizer: the user's own, or `out`/base, where they are put if they are missing.

    Args:
        texts: what a model from scratch is trained on.
    """
    base = out / "base"
    if settings.model not in (SMOLLM2, FROM_SCRATCH):
        return Path(settings.model).absolute()
    if base.exists():
        return base
    if settings.model == FROM_SCRATCH:
        tokenizer: Any = train_tokenizer(texts)
        model: Any = pretrain(texts, tokenizer, settings.pretrain_steps, settings.seed)
    else:
        dtype = _faster_dtype()
        print(f"SmolLM2-135M-Instruct, in {str(dtype).removeprefix('torch.')} ...", flush=True)
        tokenizer = load_gguf_tokenizer(smollm2_folder(), GGUF_FILE)
        model = load_gguf_model(smollm2_folder(), GGUF_FILE, dtype=dtype)
    save_model(base, model, tokenizer)
    return base


def load_policy(base: Path, trained: Path | None = None, *, dtype: str = "auto") -> PreTrainedModel:
    """The model that all methods start from, or what one of them made of it: a model or adapters in `trained`."""
    if trained is None or not (trained / "adapter_config.json").exists():
        model: Any = AutoModelForCausalLM.from_pretrained(trained or base, dtype=dtype)
        return model.to(device())
    from peft import PeftModel

    return PeftModel.from_pretrained(load_policy(base), str(trained))  # type: ignore[return-value]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _faster_dtype() -> torch.dtype:
    """The type in which this machine multiplies matrices faster: not every CPU has instructions for bfloat16."""
    if torch.cuda.is_available():
        return torch.bfloat16
    return min((torch.bfloat16, torch.float32), key=_seconds_of_product)


def _seconds_of_product(dtype: torch.dtype) -> float:
    matrix, times = torch.ones(1024, 1024, dtype=dtype), []
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)
