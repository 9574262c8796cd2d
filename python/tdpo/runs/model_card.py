"""The README.md that is saved with a model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import yaml
from torch import nn
from transformers import TrainerState

from ..config import TDPOConfig
from ..loss.objectives import OBJECTIVES

CITATION = """@inproceedings{zeng2024tdpo,
  title     = {Token-level Direct Preference Optimization},
  author    = {Zeng, Yongcheng and Liu, Guoqing and Ma, Weiyu and Yang, Ning and Zhang, Haifeng and Wang, Jun},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}"""
# Options that say how a model came to be; the others say where, or how fast.
_OPTIONS = (
    *("variant", "beta", "alpha", "label_smoothing", "simpo_gamma", "kl_direction"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "weight_decay"),
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("max_length", "max_prompt_length", "overlong", "bf16", "fp16", "seed"),
)
_ALWAYS = ("variant", "beta", "alpha", "learning_rate", "optim")
_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "kl/chosen", "kl/rejected")


def model_card(
    args: TDPOConfig, model: nn.Module, state: TrainerState, *, data: str | None, pairs: int | None, processes: int
) -> str:
    """Markdown: the base model, the data, the options, the final metrics, and the paper to cite.

    Args:
        model: the policy, unwrapped.
        data, pairs: name and size of the training data, as far as they are known.
        processes: how many trained.
    """
    base = getattr(model.config, "_name_or_path", "")
    front = {"library_name": "transformers", "tags": ["tdpo", "preference-optimization"]}
    if base:
        front["base_model"] = base
    options = dict(_options(args))
    for adapters in getattr(model, "peft_config", {}).values():
        front["library_name"] = "peft"
        options |= {"adapters": type(adapters).__name__, "rank": getattr(adapters, "r", None)}
    data = data or "preference pairs given in memory"
    rows = "" if pairs is None else f" ({pairs:,} pairs)"
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        "# A model aligned by token-level direct preference optimization",
        f"Trained from `{base or 'a model given in memory'}` on `{data}`{rows} with tdpo_ext, for "
        f"{state.global_step} steps on {processes} process(es).",
        f"```yaml\n{yaml.safe_dump(options, sort_keys=False)}```",
        *_results(state.log_history),
        "The method is that of [arXiv 2404.11999](https://arxiv.org/abs/2404.11999):",
        f"```bibtex\n{CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _options(args: TDPOConfig) -> Iterator[tuple[str, Any]]:
    """The options that differ from their defaults, and the most telling ones, as a person writes them."""
    defaults = {field.name: field.default for field in fields(TDPOConfig)}
    for name in _OPTIONS:
        value, default = (getattr(of, "value", of) for of in (getattr(args, name), defaults[name]))
        if name == "alpha" and "alpha" not in OBJECTIVES[args.variant].options:
            continue
        if name in _ALWAYS or value != default:
            yield name, value


def _results(history: list[dict[str, float]]) -> Iterator[str]:
    """The last means of training, and a row for every evaluation: together the frontier of reward and KL."""
    training = [entry for entry in history if "loss" in entry]
    if training:
        yield "Last training step:"
        yield _table([_row("step", training[-1], "")])
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if evaluations:
        yield "Evaluations (the accuracy of implicit rewards over the KL from the reference):"
        yield _table([_row("step", entry, "eval_") for entry in evaluations])


def _row(first: str, entry: dict[str, float], prefix: str) -> dict[str, str]:
    row = {first: str(entry["step"])}
    return row | {name: f"{entry[prefix + name]:.4g}" for name in _METRICS if prefix + name in entry}


def _table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
