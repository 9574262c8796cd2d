"""Rows of a prompt, a chosen and a rejected response: checks, and prompts apart from responses that repeat them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ..plain import checks

RESPONSES = ("chosen", "rejected")
HUMAN_TURN, ASSISTANT_TURN = "\n\nHuman:", "\n\nAssistant:"  # of transcripts in the manner of Anthropic's HH
BEFORE_ANSWERS = ("system", "developer", "user")  # roles that begin a conversation, never a response
_TEXT_PARTS = ("text", "input_text", "output_text", "thinking", "reasoning")  # of a message's content
_SAYS = ("content", "tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def check_row(row: dict[str, Any]) -> None:
    """Checks that the columns of a row are texts or lists of chat messages, or null; the error names the column."""
    for name in ("prompt", "conversations", *RESPONSES):
        value = row.get(name)
        if value is None or isinstance(value, str):
            continue
        if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
            raise ValueError(f"{name!r} is {checks.describe(value)}; it must be a text or a list of chat messages")
        for message in value:
            _check_message(name, message)
    chosen, rejected = row["chosen"], row["rejected"]
    if None not in (chosen, rejected) and isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("'chosen' and 'rejected' must both be texts or both lists of chat messages")


def check_ids(name: str, ids: Any, vocab_size: int) -> None:
    """Checks that a column is a list of token ids; the error names it."""
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ValueError(f"{name!r} is {checks.describe(ids)}; it must be a list of token ids")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise ValueError(f"{name!r} holds {token}; token ids are 0 to {vocab_size - 1}")


def check_token_column(name: str, values: Any, length: int) -> None:
    """Checks that a column is a list of `length` finite numbers; the error names it."""
    numbers = isinstance(values, list) and all(type(value) in (bool, int, float) for value in values)
    if not numbers or not all(map(math.isfinite, values)):
        raise ValueError(f"{name!r} is {checks.describe(values)}; it must be a list of finite numbers")
    if len(values) != length:
        raise ValueError(f"{name!r} has {len(values)} numbers for {length} tokens")


def _check_message(name: str, message: dict[str, Any]) -> None:
    role, content = message.get("role"), message.get("content")
    if role is None:
        raise ValueError(f"a message of {name!r} has no 'role': {checks.describe(message)}")
    if not isinstance(role, str):
        raise ValueError(f"the 'role' of a message of {name!r} is {checks.describe(role)}; it must be a text")
    if all(part is None for key, part in message.items() if key != "role"):  # a tool call needs no text
        raise ValueError(f"a message of {name!r} has no 'content': {checks.describe(message)}")
    if isinstance(content, list):
        kinds = [part.get("type") for part in content if isinstance(part, dict)]
        others = [kind for kind in kinds if kind not in _TEXT_PARTS]
        if others:
            raise ValueError(f"a message of {name!r} holds content of type {others[0]!r}; only text is supported")
        if len(kinds) == len(content):
            return
    if content is not None and not isinstance(content, str):
        raise ValueError(f"the 'content' of a message of {name!r} is {checks.describe(content)}; it must be a text")


def is_transcript(text: str) -> bool:
    """Whether a text is a conversation in the manner of Anthropic's HH."""
    return text.lstrip().startswith(HUMAN_TURN.lstrip())


def is_empty(response: Any) -> bool:
    """Whether a response, of any form, says nothing; messages do so without content and calls of tools."""
    if not response or isinstance(response, str) or not isinstance(response[0], dict):
        return not response
    return not any(message.get(key) for message in response for key in _SAYS)


def with_own_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt, in the form of the responses, and without it in the responses.

    Args:
        row: a row that `check_row` accepts, with both responses.

    Raises:
        ValueError: the responses are whole conversations that don't share the prompt.
    """
    row = {name: _without_nulls(value) for name, value in row.items()}
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    if prompt is None:
        return _split(row, _implicit_prompt_length(chosen, rejected))
    if isinstance(chosen, str):
        if is_transcript(prompt) or not all(map(is_transcript, (chosen, rejected))):
            return row
        # The prompt's text and whole transcripts.
        if not all(prompt.strip() in transcript for transcript in (chosen, rejected)):
            raise ValueError("'chosen' and 'rejected' are whole transcripts, which don't hold the 'prompt'")
        return _split(row, _implicit_prompt_length(chosen, rejected))
    if isinstance(prompt, str):
        if chosen[0]["role"] not in BEFORE_ANSWERS:
            return {**row, "prompt": [{"role": "user", "content": prompt}]}
        # The prompt's text and whole conversations, as in UltraFeedback binarized.
        length = _implicit_prompt_length(chosen, rejected)
        asked = [message.get("content") for message in chosen[:length] if message["role"] == "user"]
        if prompt.strip() not in [content.strip() for content in asked if isinstance(content, str)]:
            raise ValueError("'chosen' and 'rejected' are whole conversations, which don't share the 'prompt'")
        return _split(row, length)
    if prompt and all(_said(row[side][: len(prompt)]) == _said(prompt) for side in RESPONSES):
        return _split(row, min(len(prompt), len(chosen) - 1, len(rejected) - 1))
    return row


def _without_nulls(value: Any) -> Any:
    """Messages and tools without what a table has filled in where other rows have more; a null content stays."""
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None or key == "content"}
    return value


def _split(row: dict[str, Any], length: int) -> dict[str, Any]:
    chosen, rejected = row["chosen"], row["rejected"]
    return {**row, "prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _said(messages: list[dict[str, Any]]) -> list[list[Any]]:
    return [[message.get(key) for key in ("role", *_SAYS)] for message in messages]


def shared_prefix_length(first: Sequence, second: Sequence) -> int:
    if first[: len(second)] == second:  # at once, as most often
        return len(second)
    different = (place for place, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(different, min(len(first), len(second)))


def _implicit_prompt_length(chosen: Any, rejected: Any) -> int:
    """The length, in characters or messages, of the prompt that both responses begin with."""
    if not isinstance(chosen, str):
        return min(shared_prefix_length(_said(chosen), _said(rejected)), len(chosen) - 1, len(rejected) - 1)
    shared = shared_prefix_length(chosen, rejected)
    if is_transcript(chosen):  # the prompt ends where the assistant's last shared turn begins
        turn = chosen.rfind(ASSISTANT_TURN, 0, shared)
        return 0 if turn < 0 else turn + len(ASSISTANT_TURN)
    if shared < min(len(chosen), len(rejected)):  # not within a word
        shared = chosen.rfind(" ", 0, shared)
    return max(shared, 0)
