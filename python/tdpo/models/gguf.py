"""Models in GGUF files, whose weights llama.cpp and others quantize: loaded dequantized, as any other checkpoint."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf_model(folder: str | Path, gguf_file: str, **options: Any) -> PreTrainedModel:
    """The causal language model of a GGUF file, with dense weights that can be trained and saved.

    Args:
        folder: the folder that holds the file, a hub name, or a folder of adapters that were trained on the file.
        gguf_file: its name.
        options: as `from_pretrained` takes them; without a `dtype` the weights are float32.

    Raises:
        ValueError: the file or the package `gguf` is missing.
    """
    _check(folder, gguf_file)
    from transformers import AutoModelForCausalLM, GgufConfig

    # Otherwise weights may stay in the file's blocks, where nothing can train them and no checkpoint can hold them.
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, quantization_config=dense, **options)
    model.gguf_file = gguf_file  # the folder alone, which the config names, does not tell which model this is
    return model


def load_gguf_tokenizer(folder: str | Path, gguf_file: str, **options: Any) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file, with its chat template.

    Raises:
        ValueError: the file or the package `gguf` is missing.
    """
    _check(folder, gguf_file)
    from transformers import AutoTokenizer

    if _holds_adapters(folder):  # and the tokenizer, as it was saved with them
        return AutoTokenizer.from_pretrained(folder, **options)
    return AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file, **options)


def _holds_adapters(folder: str | Path) -> bool:
    return Path(folder, "adapter_config.json").is_file()


def _check(folder: str | Path, gguf_file: str) -> None:
    folder = Path(folder)
    if folder.is_dir() and not _holds_adapters(folder) and not (folder / gguf_file).is_file():
        others = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
        raise ValueError(f"gguf_file is {gguf_file}, which is not in {folder}; GGUF files there: {others}")
    if find_spec("gguf") is None:
        raise ValueError("a GGUF file can't be read without the package gguf; run `pip install 'tdpo_ext[gguf]'`")
