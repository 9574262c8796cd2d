"""What a chat template makes of messages: where a response begins in its text, and each turn of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from .rows import BEFORE_ANSWERS, shared_prefix_length

Message = dict[str, Any]
Span = tuple[int, int]  # begin and end, in characters
_LEARNED_ROLES = ("assistant", "model")
_CONTEXT_ROLES = (*BEFORE_ANSWERS, "tool", "function", "ipython", "environment", "observation", "tool_response")
_MARKS = re.compile(r"{%-?\s*generation\s*-?%}")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, with what a row gives it.

    Attributes:
        tokenizer: of the policy.
        options: `tools`, and whatever else the template reads beside messages.
        closing_token: the special token that a text ends with, or None.
        end_tokens: all such tokens.
    """

    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]
    closing_token: Callable[[str], int | None]
    end_tokens: Collection[int]

    def render(self, messages: list[Message], **how: Any) -> Any:
        """The messages as one text; `how` is what `apply_chat_template` takes.

        Raises:
            ValueError: the template can't render them.
        """
        try:
            return self.tokenizer.apply_chat_template(messages, **{"tokenize": False, **self.options, **how})
        except Exception as error:  # a template may run into any
            reason = " ".join(str(error).split())
            raise ValueError(f"the tokenizer's chat template can't render its messages: {reason}") from error

    def response_begins(self, text: str, prompt: list[Message], response: list[Message]) -> int:
        """Where in `text`, the rendered conversation, the response begins, in characters.

        Raises:
            ValueError: the prompt reads differently in it.
        """
        if not prompt:
            raise ValueError("it has no prompt: messages of a response need some of a prompt before them")
        answered = prompt[-1]["role"] == "assistant"
        if answered and response[0]["role"] in BEFORE_ANSWERS:  # the first turn of the response is another's
            before = self.render(prompt)
            if text.startswith(before):
                return len(before)
        begun = answered and bool(prompt[-1].get("content")) and not prompt[-1].get("tool_calls")
        begin = self._turn_begins(text, prompt, begun=begun)  # a message that is begun stays open
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
        learned: list[Span] = []
        open_turn = False  # the token before is learned, and ends no turn
        for token, span, inside in zip(again["input_ids"], again["offset_mapping"], marked["assistant_masks"]):
            ends = token in self.end_tokens
            if inside or (ends and open_turn):  # a turn's end token is the turn's, though marks may leave it out
                learned.append(span)
            open_turn = bool(inside) and not ends
        return learned

    def _asking(self, messages: list[Message], *, begun: bool) -> str:
        """The messages and what asks for the assistant's next, or the last of them left open."""
        return self.render(messages, **{"continue_final_message" if begun else "add_generation_prompt": True})

    def _turn_begins(self, text: str, before: list[Message], *, begun: bool = False) -> int | None:
        """Where in a conversation the turn behind some of its messages begins; None if they read differently in it."""
        asking = self._asking(before, begun=begun)
        # What a template writes to ask for a turn may differ from what it writes before one, such as `<think>`.
        plain = asking.rstrip() if begun else self.render(before)
        begin = shared_prefix_length(text, asking)
        return begin if begin >= shared_prefix_length(asking, plain) else None

    def _rendered_turns(self, text: str, begin: int, prompt: list[Message], response: list[Message]) -> list[Span]:
        """The assistant's turns, found by rendering the conversation up to each of them."""
        spans = []
        for place, message in enumerate(response):
            if message["role"] in _CONTEXT_ROLES:
                continue
            if message["role"] not in _LEARNED_ROLES:
                raise ValueError(
                    f"turn {place + 1} of a response has the role {message['role']!r}, and it is not known whether to "
                    "learn it: name it 'assistant' or 'tool', or learn every turn with learned_turns='all'"
                )
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
        turn, said = alone[begin:], _said(message)
        # Where the turn continues as in the conversation; most often at its beginning.
        more = next((place for place in range(len(turn)) if _continues(text, begin, turn, place)), len(turn))
        if more and not (said and said in turn[more:]):
            return None
        turn = turn[more:]
        closed = self.closing_token(turn) is not None
        return begin + len(turn.rstrip() if closed else turn)  # white space behind an end token is nobody's turn


def _continues(text: str, begin: int, turn: str, place: int) -> bool:
    """Whether the text from `begin` on begins with the turn from `place` on."""
    return text.startswith(turn[place : place + 64], begin) and text.startswith(turn[place:], begin)


def _said(message: Message) -> str:
    """The last text of a message without its thoughts, or the name of the tool that it calls last."""
    if message.get("tool_calls"):
        call = message["tool_calls"][-1]
        return str(call.get("function", call).get("name", ""))
    content = message.get("content") or ""
    if not isinstance(content, str):
        content = content[-1].get("text") or ""
    return content.rpartition("</think>")[2].strip()
