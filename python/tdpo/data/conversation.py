"""A prompt with a response behind it as one text, which parts of it the loss sees, and both as tokens."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from tdpo_ext import checks

from .rows import ASSISTANT_TURN, BEFORE_ANSWERS, HUMAN_TURN, RESPONSES, shared_prefix_length

Message = dict[str, Any]
Span = tuple[int, int]  # begin and end, in characters
_LEARNED_ROLES = ("assistant", "model")
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


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
            if row.get("system"):
                raise ValueError("'system' is given, but this row holds texts; only chat messages take one")
            chosen, rejected = (self._of_texts(row["prompt"], row[side]) for side in RESPONSES)
            return chosen, rejected
        if self.tokenizer.chat_template is None:
            raise ValueError("the dataset holds chat messages but the tokenizer has no chat template")
        messages = _with_system(row)
        options = {"tools": _tools(row), "tokenize": False, **(row.get("chat_template_kwargs") or {})}
        render = functools.partial(self.tokenizer.apply_chat_template, **options)  # to a text
        template = _Template(render, self)
        chosen, rejected = (template.conversation(messages, row[side]) for side in RESPONSES)
        return chosen, rejected

    def _of_texts(self, prompt: str, response: str) -> Conversation:
        """Texts; in a transcript the human's turns inside the response are context."""
        text, context = prompt + response, []
        if self.learned_turns == "assistant" and prompt.startswith(HUMAN_TURN):
            begin = text.find(HUMAN_TURN, len(prompt))
            while begin >= 0:
                answer = text.find(ASSISTANT_TURN, begin)
                end = len(text) if answer < 0 else answer + len(ASSISTANT_TURN)
                context.append((begin, end))
                begin = text.find(HUMAN_TURN, end)
        return _without_trailing_context(Conversation(text, len(prompt), context, templated=False))

    def tokens(self, conversation: Conversation) -> Tokens:
        """A conversation as tokens; one that spans the end of prompt or context belongs to what is learned."""
        text, response = conversation.text, conversation.response
        encode = functools.partial(self.tokenizer, add_special_tokens=not conversation.templated)
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


class _Template(NamedTuple):
    """A tokenizer's chat template, with what a row gives it."""

    render: functools.partial[Any]
    reader: ConversationTokenizer

    def conversation(self, prompt: list[Message], response: list[Message]) -> Conversation:
        """The prompt's messages with a response's behind them."""
        text = self.render([*prompt, *response])
        begun = bool(prompt) and prompt[-1]["role"] == "assistant"  # then its message stays open
        begin = self._turn_begins(text, prompt, begun=begun)
        if begin is None or response[0]["role"] in BEFORE_ANSWERS:
            raise ValueError(
                "the tokenizer's chat template renders the prompt differently when a response follows, so the response "
                f"can't be separated from it; prompt: {self._asking(prompt, begun=begun)[-80:]!r}"
            )
        context: list[Span] = []
        if self.reader.learned_turns == "assistant" and len(response) > 1:
            marked = self._marked(prompt, response)
            learned = self._turns(text, begin, prompt, response) if marked is None else marked
            context = _between(learned, begin, len(text))
        return _without_trailing_context(Conversation(text, begin, context, templated=True))

    def _asking(self, messages: list[Message], *, begun: bool) -> str:
        """The messages and what asks for the assistant's next, or the last of them left open."""
        return self.render(messages, **{"continue_final_message" if begun else "add_generation_prompt": True})

    def _turn_begins(self, text: str, before: list[Message], *, begun: bool = False) -> int | None:
        """Where in a conversation the turn behind some of its messages begins; None if they read differently in it."""
        asking = self._asking(before, begun=begun)
        # What a template writes to ask for a turn may differ from what it writes before one, such as `<think>`.
        plain = asking.rstrip() if begun or not before else self.render(before)
        begin = shared_prefix_length(text, asking)
        return begin if begin >= shared_prefix_length(asking, plain) else None

    def _marked(self, prompt: list[Message], response: list[Message]) -> list[Span] | None:
        """The spans that the template's `generation` marks enclose; None where it has no marks."""
        template = self.render.keywords.get("chat_template") or self.reader.tokenizer.get_chat_template(
            tools=self.render.keywords["tools"]
        )
        if not _MARKS.search(template):
            return None
        messages = [*prompt, *response]
        marked = self.render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        again = self.reader.tokenizer(self.render(messages), add_special_tokens=False, return_offsets_mapping=True)
        if marked["input_ids"] != again["input_ids"]:
            raise ValueError("the tokenizer gives other tokens when its chat template's `generation` marks are read")
        return [span for span, inside in zip(again["offset_mapping"], marked["assistant_masks"]) if inside]

    def _turns(self, text: str, begin: int, prompt: list[Message], response: list[Message]) -> list[Span]:
        """The spans of the assistant's turns in a response, found by rendering the conversation up to each of them."""
        spans = []
        for place, message in enumerate(response):
            if message["role"] not in _LEARNED_ROLES:
                continue
            before = [*prompt, *response[:place]]
            first = self._turn_begins(text, before) if place else begin
            last = len(text) if place == len(response) - 1 else self._turn_ends(text, first, before, message)
            if first is None or last is None:
                raise ValueError(
                    f"the tokenizer's chat template has no `generation` marks and renders turn {place + 1} of a "
                    "response differently when others follow, so the assistant's turns can't be told from the rest: "
                    "mark them in the template, or learn every turn of a response with learned_turns='all'"
                )
            spans.append((first, last))
        return spans

    def _turn_ends(self, text: str, begin: int | None, before: list[Message], message: Message) -> int | None:
        """Where the turn of a message ends in a longer conversation; None if it reads differently when it is the last.

        A last turn may have more at its beginning, such as an empty `<think>` block.
        """
        alone = self.render([*before, message])
        if begin is None or alone[:begin] != text[:begin]:
            return None
        turn = alone[begin:]
        more = next((place for place in range(len(turn)) if text.startswith(turn[place:], begin)), len(turn))
        said, turn = _said(message), turn[more:]
        if more and not (said and said in turn):
            return None
        closed = self.reader.closing_token(turn) is not None
        return begin + len(turn.rstrip() if closed else turn)  # white space behind an end token is nobody's turn


def _said(message: Message) -> str:
    """The last text of a message, without its thoughts."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = content[-1].get("text") or ""
    return content.rpartition("</think>")[2].strip()


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


def _tools(row: dict[str, Any]) -> Any:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise ValueError(f"'tools' is no valid JSON: {error}") from error
    if not isinstance(tools, (list, type(None))):
        raise ValueError(f"'tools' is {checks.describe(tools)}; it must be a list of tools, or one as JSON text")
    return tools
