"""A prompt with a response behind it as one text, which parts of it the loss sees, and both as tokens."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tdpo_ext import checks

from .rows import ASSISTANT_TURN, HUMAN_TURN, RESPONSES, is_transcript, shared_prefix_length
from .template import ChatTemplate, Message, Span


class Conversation(NamedTuple):
    """A prompt with one response behind it, as the model sees it.

    Attributes:
        text: all of it, up to the end of the last turn that is learned, if any is.
        response: where the response begins, in characters.
        context: the parts of the response that the model reads but does not learn, in order.
        templated: a chat template made it, special tokens included.
    """

    text: str
    response: int
    context: list[Span]
    templated: bool


class Tokens(NamedTuple):
    """A conversation's tokens.

    Attributes:
        ids: all of them.
        prompt: how many of them belong to the prompt alone.
        mask: of every token, whether the loss may see it.
    """

    ids: list[int]
    prompt: int
    mask: list[bool]


@dataclass
class ConversationTokenizer:
    """Makes conversations of rows, and tokens of conversations.

    Attributes:
        tokenizer: of the policy.
        learned_turns: "assistant": of a response of several turns the others are context; "all": nothing is.
    """

    tokenizer: PreTrainedTokenizerBase
    learned_turns: str

    def conversations(self, row: dict[str, Any]) -> tuple[Conversation, Conversation]:
        """The prompt with the chosen response and with the rejected one; messages go through the chat template.

        Args:
            row: from `with_own_prompt`.

        Raises:
            ValueError: columns that contradict each other, or a template that does not keep prompt or turns apart.
        """
        if isinstance(row["chosen"], str):
            for name in ("system", "tools", "chat_template_kwargs"):
                if row.get(name):
                    raise ValueError(f"{name!r} is given, but this row holds texts; only chat messages take it")
            chosen, rejected = (self._of_texts(row["prompt"], row[side]) for side in RESPONSES)
            return chosen, rejected
        if self.tokenizer.chat_template is None:
            raise ValueError("the dataset holds chat messages but the tokenizer has no chat template")
        options = {"tools": _list_or_none("tools", row), **_template_options(row)}
        end_tokens = self._special_tokens.values()
        template = ChatTemplate(self.tokenizer, options, self.closing_token, end_tokens)
        prompt = _with_system(row)
        chosen, rejected = (self._of_messages(template, prompt, row[side]) for side in RESPONSES)
        return chosen, rejected

    def _of_messages(self, template: ChatTemplate, prompt: list[Message], response: list[Message]) -> Conversation:
        text = template.render([*prompt, *response])
        begin = template.response_begins(text, prompt, response)
        context: list[Span] = []
        if self.learned_turns == "assistant" and len(response) > 1:
            context = _between(template.learned_spans(text, begin, prompt, response), begin, len(text))
        return _without_trailing_context(Conversation(text, begin, context, templated=True))

    def _of_texts(self, prompt: str, response: str) -> Conversation:
        """Texts; in a transcript the human's turns inside the response are context."""
        text, context = prompt + response, []
        if self.learned_turns == "assistant" and is_transcript(text):
            begin = text.find(HUMAN_TURN, len(prompt)) if prompt else 0
            while begin >= 0:
                answer = text.find(ASSISTANT_TURN, begin)
                end = len(text) if answer < 0 else answer + len(ASSISTANT_TURN)
                context.append((begin, end))
                begin = text.find(HUMAN_TURN, end)
        return _without_trailing_context(Conversation(text, len(prompt), context, templated=False))

    def tokens(self, conversation: Conversation) -> Tokens:
        """A conversation as tokens; one that spans the end of prompt or context belongs to what is learned."""
        text, response = conversation.text, conversation.response
        encode = functools.partial(self.tokenizer.__call__, add_special_tokens=not conversation.templated)
        if self.tokenizer.is_fast:
            encoded = encode(text, return_offsets_mapping=True)
            ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
            prompt = next((place for place, (_, end) in enumerate(offsets) if end > response), len(ids))
            hidden = {
                place
                for first, last in conversation.context
                for place, (begin, end) in enumerate(offsets)
                if first <= begin and first < end <= last
            }
        else:
            ids = encode(text)["input_ids"]
            until = [shared_prefix_length(ids, encode(text[:place])["input_ids"]) for place in _edges(conversation)]
            prompt, edges = until[0], until[1:]
            hidden = {place for first, last in zip(edges[::2], edges[1::2]) for place in range(first, last)}
        return Tokens(ids, prompt, [place not in hidden for place in range(len(ids))])

    def closing_token(self, text: str) -> int | None:
        """The special token that a text ends with, perhaps before white space: of chat templates, what ends a turn.

        White space behind it stays in a conversation, since models were trained with it.
        """
        text = text.rstrip()
        ends = [token for token in self._special_tokens if text.endswith(token)]
        return self._special_tokens[max(ends, key=len)] if ends else None

    @functools.cached_property
    def _special_tokens(self) -> dict[str, int]:
        added = self.tokenizer.added_tokens_decoder.items()
        ids = {token.content: number for number, token in added if token.special}
        ids.pop(self.tokenizer.unk_token, None)
        return ids | {self.tokenizer.eos_token: self.tokenizer.eos_token_id}


def _edges(conversation: Conversation) -> list[int]:
    return [conversation.response, *(place for span in conversation.context for place in span)]


def _without_trailing_context(conversation: Conversation) -> Conversation:
    """Without turns at the end that nothing learned follows; where all of a response is context, it stays."""
    if not conversation.context:
        return conversation
    *context, (begin, end) = conversation.context
    if end < len(conversation.text) or begin == conversation.response:
        return conversation
    return conversation._replace(text=conversation.text[:begin], context=context)


def _between(spans: Sequence[Span], begin: int, end: int) -> list[Span]:
    """What spans, in order, leave of another."""
    gaps, place = [], begin
    for first, last in spans:
        if place < first:
            gaps.append((place, first))
        place = max(place, last)
    return gaps + ([(place, end)] if place < end else [])


def _with_system(row: dict[str, Any]) -> list[Message]:
    """The prompt's messages, after that of the column `system` if there is one."""
    messages, system = row["prompt"], row.get("system")
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise ValueError(f"'system' is {checks.describe(system)}; it must be a text")
    if messages and messages[0]["role"] == "system":
        raise ValueError("'system' is given, but the conversation begins with a system message of its own")
    return [{"role": "system", "content": system}, *messages]


def _list_or_none(name: str, row: dict[str, Any]) -> list[Any] | None:
    value = _parsed(name, row)
    if not isinstance(value, (list, type(None))):
        raise ValueError(f"{name!r} is {checks.describe(value)}; it must be a list of {name}, or one as JSON text")
    return value


def _template_options(row: dict[str, Any]) -> dict[str, Any]:
    name = "chat_template_kwargs"
    options = _parsed(name, row) or {}
    if not isinstance(options, dict):
        raise ValueError(f"{name!r} is {checks.describe(options)}; it must be a mapping, or one as JSON text")
    for reserved in ("add_generation_prompt", "continue_final_message", "tokenize", "tools"):
        if reserved in options:
            raise ValueError(f"{name!r} has {reserved!r}, which is set for every part of a row: leave it out")
    return options


def _parsed(name: str, row: dict[str, Any]) -> Any:
    """A column's value, which may be JSON text; a blank text is None."""
    value = row.get(name)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise ValueError(f"{name!r} is no valid JSON: {error}") from error
