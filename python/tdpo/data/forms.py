"""From the forms that preference data come in to rows of `prompt`, `chosen` and `rejected` (docs/data.md has all)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ..plain import checks
from .rows import BEFORE_ANSWERS, RESPONSES, is_transcript

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_READ = ("prompt", *RESPONSES, "system", "tools", "chat_template_kwargs")  # beside token ids
_TARGETS = (*_READ, "conversations", "instruction", "input", "responses", "scores", "ranks")
_ROLES = {  # of ShareGPT
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}

_SPEAKERS = {*_ROLES, "developer", "function", "ipython"}
_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*{\s*["'](role|content|from|value)["']\s*:""")


def column_mapping(columns: Any) -> dict[str, str | None]:
    """The option `columns` as a mapping of the names here to those in the data.

    Args:
        columns: a mapping; or a text, `prompt=question,chosen=best` or a mapping as JSON; an empty name is None.

    Raises:
        TypeError, ValueError: it is something else.
    """
    if isinstance(columns, str):
        columns = _mapping_of_text(columns)
    if columns is None:
        return {}
    names = [*columns, *columns.values()] if isinstance(columns, dict) else [0]
    if not all(isinstance(name, (str, type(None))) for name in names):
        raise TypeError(f"columns is {columns!r}; a mapping of names is needed, such as prompt=question")
    return {ours: theirs or None for ours, theirs in columns.items()}


def _mapping_of_text(text: str) -> Any:
    if text.lstrip().startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(f"columns is {text!r}, no valid JSON: {error}") from error
    parts = [part.partition("=") for part in text.split(",")]
    if not all(ours.strip() and equals for ours, equals, _ in parts):
        raise ValueError(f"columns is {text!r}; write prompt=question,chosen=best, or a mapping as JSON")
    return {ours.strip(): theirs.strip() for ours, _, theirs in parts}


def check_columns(columns: Mapping[str, str | None], names: list[str]) -> None:
    """Checks a mapping of columns against the names that a dataset has.

    Raises:
        ValueError: a name that rows never read, one that the dataset lacks, or an `instruction` without its `input`.
    """
    for ours, theirs in columns.items():
        if ours not in _TARGETS and not ours.startswith(("prompt_", "chosen_", "rejected_")):
            raise ValueError(f"columns maps {ours!r}, which no row reads; names to map are {', '.join(_TARGETS)}")
        if theirs is not None and theirs not in names:
            raise ValueError(
                f"columns takes {ours!r} from {theirs!r}, which the dataset lacks; it has {', '.join(names)}"
            )
    for ours, theirs in columns.items():
        if theirs in ("prompt", *RESPONSES) and theirs not in columns:
            raise ValueError(f"columns takes {ours!r} from {theirs!r}, which is a column of its own: map that one too")
    if columns.get("prompt") == "instruction" and "input" in names and "input" not in columns.values():
        raise ValueError(
            "columns takes 'prompt' from 'instruction', so 'input' would be lost; leave that out, and both are read"
        )


def renamed(row: Mapping[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The row under the names that rows have here; a column that is mapped to None is left out.

    Args:
        row: of a dataset that `check_columns` accepts.
        columns: from the names here to those in the data.
    """
    renames = {ours: theirs for ours, theirs in columns.items() if theirs is not None and theirs in row}
    taken = {*renames.values()}
    left_out = {ours for ours, theirs in columns.items() if theirs is None}
    kept = {name: value for name, value in row.items() if name not in taken | left_out}
    return kept | {ours: row[theirs] for ours, theirs in renames.items()}


def with_messages(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its messages as chat templates take them, whatever form they have; texts stay as they are.

    Messages may be one alone, as JSON text, or with `from` and `value` in the manner of ShareGPT.

    Raises:
        ValueError: a text that begins as such JSON and is none, a message `from` someone unknown, or media.
    """
    for name in _MEDIA:
        if _holds_something(row.get(name)):
            raise ValueError(f"{name!r} holds media; only text is supported")
    return row | {name: _messages(name, row[name]) for name in ("prompt", "conversations", *RESPONSES) if name in row}


def _messages(name: str, value: Any) -> Any:
    if isinstance(value, str):
        value = _parsed(name, value)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        return value
    return [_message(name, message) if isinstance(message, dict) else message for message in value]


def _parsed(name: str, text: str) -> Any:
    """Messages that a text holds as JSON, or the text."""
    try:
        messages = json.loads(text) if text.lstrip().startswith(("[", "{")) else None
    except ValueError as error:
        if _LIKE_MESSAGES.match(text):
            raise ValueError(f"{name!r} begins like chat messages as JSON, but is none: {error}") from error
        return text
    entries = messages if isinstance(messages, list) else [messages]
    return messages if entries and all(map(_is_message, entries)) else text


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    speaks = value.get("role", value.get("from"))
    return (
        isinstance(speaks, str)
        and speaks.lower() in _SPEAKERS
        and bool({"content", "value", "tool_calls"} & value.keys())
    )


def _message(name: str, message: dict[str, Any]) -> dict[str, Any]:
    if message.get("from") is None or message.get("role") is not None:
        return message
    speaker = message["from"]
    if speaker not in _ROLES:
        raise ValueError(
            f"a message of {name!r} is from {speaker!r}; known are {', '.join(_ROLES)}. Messages with 'role' and "
            "'content' may have any role that the chat template knows"
        )
    others = {key: value for key, value in message.items() if key not in ("from", "value", "role", "content")}
    return {"role": _ROLES[speaker], "content": message.get("value"), **others}


def with_prompt(row: dict[str, Any], columns: Mapping[str, str | None]) -> dict[str, Any]:
    """The row with its prompt, from the columns that may hold it, in `prompt`.

    Args:
        row: that `rows.check_row` accepts, with both responses.
        columns: the mapping; where it names the prompt, no other column is taken for one.

    Raises:
        ValueError: several columns hold a prompt, or none does while other texts stand unused.
    """
    names = ("prompt",) if "prompt" in columns else ("prompt", "conversations", "instruction")
    given = [name for name in names if row.get(name) not in (None, [])]
    if len(given) > 1:
        both = " and ".join(map(repr, given))
        raise ValueError(f"{both} hold a prompt; say which one is meant with columns={{'prompt': {given[0]!r}}}")
    if not given:
        if columns.get("prompt", "") is not None and not _hold_their_prompt(row):
            _check_nothing_unused(row)
        return {**row, "prompt": None}
    if _holds_something(row.get("history")):
        raise ValueError("'history' is given, which no row reads; write the conversation as chat messages in 'prompt'")
    prompt = _instruction(row) if given == ["instruction"] else row[given[0]]
    if isinstance(prompt, list):
        answers = {side: row[side] for side in RESPONSES if isinstance(row[side], str)}
        row |= {side: [{"role": "assistant", "content": answer}] for side, answer in answers.items()}
    return {**row, "prompt": prompt}


def _holds_something(value: Any) -> bool:
    return any(map(_holds_something, value)) if isinstance(value, list) else bool(value)


def _instruction(row: dict[str, Any]) -> str:
    """The prompt of a row in the manner of Alpaca."""
    parts = [row["instruction"], row.get("input") or ""]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(
            f"'instruction' is {checks.describe(parts[0])}, 'input' {checks.describe(parts[1])}: not texts"
        )
    return "\n\n".join(filter(None, parts))


def _hold_their_prompt(row: dict[str, Any]) -> bool:
    """Whether the responses are whole conversations."""
    given = [row[side] for side in RESPONSES if row[side]]
    return all(
        is_transcript(response)
        if isinstance(response, str)
        else isinstance(response[0], dict) and response[0].get("role") in BEFORE_ANSWERS
        for response in given
    )


def _check_nothing_unused(row: dict[str, Any]) -> None:
    unused = [name for name, value in row.items() if name not in _READ and _is_text(value)]
    if unused:
        raise ValueError(
            f"it has no 'prompt', and its texts {', '.join(map(repr, unused))} stand unused: say which one is the "
            f"prompt with columns={{'prompt': {unused[0]!r}}}, or that there is none with columns={{'prompt': None}} "
            f"(--columns prompt={unused[0]}, --columns prompt=)"
        )


def _is_text(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and isinstance(value[0], dict) and bool({"role", "from"} & value[0].keys())
    return isinstance(value, str) and value.strip() != ""
