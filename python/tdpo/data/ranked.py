"""From a prompt with several scored or ranked responses to preference pairs."""

from __future__ import annotations

import json
import math
from itertools import combinations, pairwise
from typing import Any, NamedTuple

from tdpo_ext import checks

_SAID = (
    "response",
    "answer",
    "text",
    "completion",
    "output",
    "content",
    "messages",
)  # where an entry holds what was said
_SCORES = ("score", "overall_score", "rating", "reward")


class _Scored(NamedTuple):
    response: Any  # a text or messages
    score: float  # the higher the better


def is_ranked(row: dict[str, Any]) -> bool:
    """Whether a row has several responses instead of a chosen and a rejected one."""
    return row.get("responses") is not None and row.get("chosen") is None and row.get("rejected") is None


def pairs_of(row: dict[str, Any], pairing: str, limit: int | None) -> list[dict[str, Any]]:
    """The pairs of a row, each a row with `chosen` and `rejected`; none where no response is better than another.

    Args:
        row: `responses`, a list of texts, of messages or of dicts that hold them, beside `scores` (the higher the
            better) or `ranks` (1 is the best), or with such numbers in the dicts. Lists may be JSON texts.
        pairing: "best_worst"; "best_others", the best with each that is worse; "adjacent", each with the next worse one
            in order; or "all". Responses of equal score make no pair.
        limit: keeps so many pairs, those of the largest differences; None keeps all.

    Raises:
        ValueError: a column is missing, has another length or holds no finite numbers.
    """
    scored = sorted(_scored(row), key=lambda entry: -entry.score)
    pairs = list(combinations(scored, 2)) if pairing == "all" else []
    if pairing == "adjacent":
        pairs = list(pairwise(scored))
    elif pairing != "all":
        pairs = [(scored[0], other) for other in scored[1:]]
    pairs = [(better, worse) for better, worse in pairs if better.score > worse.score]
    if pairing == "best_worst":
        pairs = pairs[-1:]
    if limit is not None:
        pairs = sorted(pairs, key=lambda pair: pair[1].score - pair[0].score)[:limit]
    others = {name: value for name, value in row.items() if name not in ("responses", "scores", "ranks")}
    return [{**others, "chosen": better.response, "rejected": worse.response} for better, worse in pairs]


def _scored(row: dict[str, Any]) -> list[_Scored]:
    entries = _list("responses", row["responses"])
    given = {name: _list(name, row[name]) for name in ("scores", "ranks") if row.get(name) is not None}
    if all(isinstance(entry, dict) and "role" not in entry and "from" not in entry for entry in entries):
        for name, keys in {"scores": _SCORES, "ranks": ("rank",)}.items():
            key = next((key for key in keys if any(entry.get(key) is not None for entry in entries)), None)
            if name not in given and key is not None:
                given[name] = [entry.get(key) for entry in entries]
        entries = [_said(entry) for entry in entries]
    if len(given) != 1:
        found = "both scores and ranks" if given else "neither scores nor ranks"
        raise ValueError(f"'responses' has {found}; one of them is needed, to tell the better response of two")
    ((name, values),) = given.items()
    if len(values) != len(entries):
        raise ValueError(f"'responses' has {len(entries)} entries, {name!r} has {len(values)}")
    sign = -1 if name == "ranks" else 1
    return [_Scored(entry, sign * _number(name, value)) for entry, value in zip(entries, values)]


def _list(name: str, value: Any) -> list[Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ValueError(f"{name!r} is a text, but no list as JSON: {error}") from error
    if not isinstance(value, list):
        raise ValueError(f"{name!r} is {checks.describe(value)}; it must be a list")
    return value


def _said(entry: dict[str, Any]) -> Any:
    said = [key for key in _SAID if entry.get(key) is not None]
    if len(said) != 1:
        raise ValueError(
            f"an entry of 'responses' has {', '.join(map(repr, entry))}; exactly one of {', '.join(_SAID)} is needed"
        )
    return entry[said[0]]


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number):
        raise ValueError(f"{name!r} holds {checks.describe(value)}; it must hold finite numbers")
    return number
