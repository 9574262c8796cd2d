"""What a chat template makes of messages: where a response begins in its text, and each turn of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rows import BEFORE_ANSWERS, shared_prefix_length

Message = dict[str, Any]
Span = tuple[int, int]  # begin and end, in characters
_LEARNED_ROLES = ("assistant", "model")
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with what a row gives it.

    Attributes:
        tokenizer: of the policy.
        options: `tools`, and whatever else the template reads beside messages.
        closing_token: the special token that a text ends with, or None.
    """

    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]
    closing_token: Callable[[str], int | None]

    def render(self, messages: list[Message], **how: Any) -> Any:
        """The messages as one text; `how` is what `apply_chat_template` takes."""
        return self.tokenizer.apply_chat_template(messages, **{"tokenize": False, **self.options, **how})

    def response_begins(self, text: str, prompt: list[Message], response: list[Message]) -> int:
        """Where in `text`, the rendered conversation, the response begins, in characters.

        Raises:
            ValueError: the prompt reads differently in it.
        """
        begun = bool(prompt) and prompt[-1]["role"] == "assistant"  # then its message stays open
        begin = self._turn_begins(text, prompt, begun=begun)
        if begin is None or response[0]["role"] in BEFORE_ANSWERS:
            raise ValueError(
                "the tokenizer's chat template renders the prompt differently when a response follows, so the response "
                f"can't be separated from it; prompt: {self._asking(prompt, begun=begun)[-80:]!r}"
            )
        return begin

    def learned_spans(self, text: str, begin: int, prompt: list[Message], response: list[Message]) -> list[Span]:
        """The assistant's turns in a response that begins at `begin`: by the template's marks, or else its prefixes.

        Raises:
            ValueError: neither tells the turns apart.
        """
        template = self.options.get("chat_template") or self.tokenizer.get_chat_template(tools=self.options["tools"])
        if self.tokenizer.is_fast and _MARKS.search(template):  # which other tokenizers don't read
            return self._marked(text, [*prompt, *response])
        return self._rendered_turns(text, begin, prompt, response)

    def _marked(self, text: str, messages: list[Message]) -> list[Span]:
        """What the template's `generation` marks enclose, token by token."""
        marked = self.render(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        again = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if marked["input_ids"] != again["input_ids"]:
            raise ValueError("the tokenizer gives other tokens when its chat template's `generation` marks are read")
        return [span for span, inside in zip(again["offset_mapping"], marked["assistant_masks"]) if inside]

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

    def _rendered_turns(self, text: str, begin: int, prompt: list[Message], response: list[Message]) -> list[Span]:
        """The assistant's turns, found by rendering the conversation up to each of them."""
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
        closed = self.closing_token(turn) is not None
        return begin + len(turn.rstrip() if closed else turn)  # white space behind an end token is nobody's turn


def _said(message: Message) -> str:
    """The last text of a message, without its thoughts."""
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = content[-1].get("text") or ""
    return content.rpartition("</think>")[2].strip()
