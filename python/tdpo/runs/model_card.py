"""The README.md that is saved with a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from transformers import TrainerState

from ..config import TDPOConfig
from ..loss.objectives import OBJECTIVES
from ..options import USED_BY, card_options
from .log_history import Entry, of_training

CITATION = """@inproceedings{zeng2024tdpo,
  title     = {Token-level Direct Preference Optimization},
  author    = {Zeng, Yongcheng and Liu, Guoqing and Ma, Weiyu and Yang, Ning and Zhang, Haifeng and Wang, Jun},
  booktitle = {International Conference on Machine Learning},
  year      = {2024}
}"""
_PAPER = "2404.11999"
_METRICS = ("loss", "rewards/accuracies", "rewards/margins", "kl/chosen", "kl/rejected")


def model_card(
    args: TDPOConfig,
    model: Any,
    state: TrainerState,
    *,
    own_objective: bool,
    data: str | None,
    pairs: int | None,
    processes: int,
    picture: str | None = None,
    finetuned_from: str | None = None,
    tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    language: str | None = None,
    license: str | None = None,
    model_name: str | None = None,
) -> str:
    """Markdown: the base model, the data, the options, the final metrics, and the loss with its source.

    Args:
        model: the policy, unwrapped.
        own_objective: the loss was given to the trainer, so that `variant` was not read.
        data, pairs: name and size of the training data, as far as they are known.
        processes: how many trained.
        picture: a file beside the card, of the training's log.
        finetuned_from: the base model (default: the name in the model's configuration).
        tags, dataset, language, license, model_name: for a hub; `tags` are added to those of every such model.
    """
    base = finetuned_from or model.config._name_or_path or None
    title, method = _method(args, own_objective)
    options, all_adapters = dict(_options(args, own_objective)), getattr(model, "peft_config", {})
    for adapters in all_adapters.values():
        options |= {"adapters": type(adapters).__name__, "rank": getattr(adapters, "r", None)}
    front = ModelCardData(
        library_name="peft" if all_adapters else "transformers",
        tags=["tdpo", "preference-optimization", *([tags] if isinstance(tags, str) else tags or [])],
        base_model=base,
        datasets=dataset,
        language=language,
        license=license,
        model_name=model_name,
    )
    data = data or "preference pairs given in memory"
    rows = "" if pairs is None else f" ({pairs:,} pairs)"
    parts = [
        f"---\n{front.to_yaml()}\n---",
        f"# {title}",
        f"Trained from `{base or 'a model given in memory'}` on `{data}`{rows} with tdpo_ext, for "
        f"{state.global_step} steps on {processes} process(es).",
        f"```yaml\n{yaml.safe_dump(options, sort_keys=False)}```",
        *_results(state.log_history),
        *([] if picture is None else [f"![The log of the training]({picture})"]),
        *method,
    ]
    return "\n\n".join(parts) + "\n"


def _method(args: TDPOConfig, own_objective: bool) -> tuple[str, list[str]]:
    """The card's title, and paragraphs about the loss."""
    if own_objective:
        return "A model aligned on preferences", ["The loss is an objective that was given in memory."]
    source = OBJECTIVES[args.variant].source
    if _PAPER not in source:
        return f"A model aligned on preferences by {args.variant}", [f"The loss is that of {source}."]
    return "A model aligned by token-level direct preference optimization", [
        f"The method is that of [arXiv {_PAPER}](https://arxiv.org/abs/{_PAPER}):",
        f"```bibtex\n{CITATION}\n```",
    ]


def _options(args: TDPOConfig, own_objective: bool) -> Iterator[tuple[str, Any]]:
    """The options that differ from their defaults, and the most telling ones, as a person writes them."""
    defaults = {field.name: field.default for field in fields(TDPOConfig)}
    for name, shown in card_options().items():
        if own_objective and name in ("variant", "alpha"):
            continue
        value, default = (getattr(of, "value", of) for of in (getattr(args, name), defaults[name]))
        if name == "alpha" and "alpha" not in USED_BY[args.variant]:
            continue
        if shown == "always" or value != default:
            yield name, value


def _results(history: Sequence[Entry]) -> Iterator[str]:
    """The last means of training, and a row for every evaluation: together the frontier of reward and KL."""
    training = of_training(history)
    if training:
        yield "Last training step:"
        yield _table([_row(training[-1], "")])
    evaluations = [entry for entry in history if "eval_loss" in entry]
    if evaluations:
        over_kl = " over the KL from the reference" if "eval_kl/chosen" in evaluations[-1] else ""
        yield f"Evaluations (the accuracy of implicit rewards{over_kl}):"
        yield _table([_row(entry, "eval_") for entry in evaluations])


def _row(entry: Entry, prefix: str) -> dict[str, str]:
    row = {"step": str(entry["step"])}
    return row | {name: f"{entry[prefix + name]:.4g}" for name in _METRICS if prefix + name in entry}


def _table(rows: list[dict[str, str]]) -> str:
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
