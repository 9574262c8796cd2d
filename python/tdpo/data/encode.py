"""From one preference row, in any of its forms, to token ids within the limits."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..options import RowOptions
from .conversation import ConversationTokenizer
from .forms import renamed, with_messages, with_prompt
from .ranked import is_ranked, pairs_of
from .rows import (
    RESPONSES,
    check_ids,
    check_row,
    check_token_column,
    is_empty,
    is_transcript,
    shared_prefix_length,
    with_own_prompt,
)


class Response(NamedTuple):
    """A response as the models see it.

    Attributes:
        ids: its tokens.
        mask: of every token, whether the loss sees it; the others are context.
        end: the token that ends it, perhaps before white space; None if it need not end with any.
        columns: numbers per token by name, such as `weight`.
    """

    ids: list[int]
    mask: list[bool]
    end: int | None = None
    columns: dict[str, list[float]] = {}  # noqa: RUF012

    def first(self, length: int) -> Response:
        """Its beginning."""
        columns = {name: values[:length] for name, values in self.columns.items()}
        return self._replace(ids=self.ids[:length], mask=self.mask[:length], columns=columns)

    def without_trailing_context(self) -> Response:
        """Without the tokens at its end that the loss does not see: nothing learned reads them."""
        return self.first(next((place + 1 for place in reversed(range(len(self.ids))) if self.mask[place]), 0))

    def closed(self) -> Response:
        """Itself with `end` behind it, unless that is its last token."""
        if self.end is None or self.ids[-1:] == [self.end]:
            return self
        return self._replace(ids=[*self.ids, self.end], mask=[*self.mask, True])

    def cut(self, length: int) -> Response:
        """Its beginning, closed like itself."""
        if self.end not in self.ids[length:]:
            return self.first(length)
        cut = self.first(length - 1).without_trailing_context()
        return cut.closed() if cut.ids else cut


class Pair(NamedTuple):
    """A preference as the models see it."""

    prompt: list[int]
    chosen: Response
    rejected: Response

    @property
    def length(self) -> int:
        """The tokens of the prompt and the longer response."""
        return len(self.prompt) + max(len(self.chosen.ids), len(self.rejected.ids))


class Encoded(NamedTuple):
    """What becomes of a pair: itself within the limits, or the reason why it can't be used."""

    pair: Pair | None
    dropped: str = ""
    cut_prompt: bool = False
    cut_responses: bool = False


@dataclass
class Encoder:
    """Turns rows into tokens, within the limits of `options`."""

    tokenizer: PreTrainedTokenizerBase
    options: RowOptions
    columns: dict[str, str | None]  # the mapping of `options`
    _suffix = ""  # a row's responses are named side + suffix

    def pairs(self, row: dict[str, Any]) -> Iterator[Encoded]:
        """What becomes of a row's pair, or of all pairs of its scored or ranked responses.

        Raises:
            ValueError: the row is malformed; the message says how.
        """
        rows = self._rows(renamed(row, self.columns))
        if not rows:
            yield Encoded(None, "no response that is better than another")
        yield from map(self._encode, rows)

    def _rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of one pair each."""
        if is_ranked(row):
            return pairs_of(row, self.options.pairing, self.options.pairs_per_prompt)
        return [row]

    def _encode(self, row: dict[str, Any]) -> Encoded:
        row = self._checked(row)
        for side in RESPONSES:
            if is_empty(row[f"{side}{self._suffix}"]):
                return Encoded(None, f"an empty {side!r} response")
        row = self._split(row)
        for side in RESPONSES:
            if self._says_nothing(row, side):
                return Encoded(None, f"an empty {side!r} response")
        return self._within_limits(self._whole(row))

    def _checked(self, row: dict[str, Any]) -> dict[str, Any]:
        missing = [side for side in RESPONSES if side not in row]
        if missing:
            raise ValueError(f"it has no {missing[0]!r}, and no 'responses' to choose from; it has {', '.join(row)}")
        row = with_messages(row)
        check_row(row)
        return row

    def _split(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its prompt, apart from its responses."""
        return with_own_prompt(with_prompt(row, self.columns))

    def _says_nothing(self, row: dict[str, Any], side: str) -> bool:
        """Whether nothing of a conversation is behind the prompt; a text may end with what both begin with."""
        if isinstance(row[side], str):
            return is_transcript(row["prompt"]) and not row[side].strip()
        return is_empty(row[side])

    @functools.cached_property
    def _reader(self) -> ConversationTokenizer:
        return ConversationTokenizer(self.tokenizer, self.options.learned_turns)

    def _whole(self, row: dict[str, Any]) -> Pair:
        """The tokens of a row, of any length."""
        sides = self._reader.conversations(row)
        chosen, rejected = map(self._reader.tokens, sides)
        # A token that spans the boundary belongs to its response, and then the prompt of both ends before it.
        prompt = shared_prefix_length(chosen.ids[: chosen.prompt], rejected.ids[: rejected.prompt])
        responses = []
        for conversation, side in zip(sides, (chosen, rejected)):
            response = Response(side.ids[prompt:], side.mask[prompt:])
            if conversation.templated:
                response = response._replace(end=self._reader.closing_token(conversation.text))
            learns_nothing = bool(response.ids) and not any(response.mask)
            if response.end is None and not learns_nothing:
                response = response._replace(end=self.tokenizer.eos_token_id).closed()
            responses.append(response)
        return Pair(chosen.ids[:prompt], *responses)

    def _within_limits(self, pair: Pair) -> Encoded:
        limits, responses = self.options, {"chosen": pair.chosen, "rejected": pair.rejected}
        cut_prompt = len(pair.prompt) > limits.max_prompt_length
        if cut_prompt and limits.overlong == "drop":
            return Encoded(None, f"a prompt over {limits.max_prompt_length} tokens")
        if pair.chosen.ids == pair.rejected.ids:
            return Encoded(None, "equal responses")
        prompt = self._end_of(pair.prompt)
        available = limits.max_length - len(prompt)
        overlong = [side for side, response in responses.items() if len(response.ids) > available]
        if overlong and limits.overlong == "drop":
            return Encoded(None, f"prompt and {overlong[0]!r} response over {limits.max_length} tokens")
        responses |= {side: responses[side].cut(available) for side in overlong}
        if responses["chosen"].ids == responses["rejected"].ids:
            return Encoded(None, f"responses that are equal once cut to max_length, {limits.max_length} tokens")
        for side, response in responses.items():
            if not any(response.mask):
                return Encoded(None, f"a {side!r} response without a turn of the assistant to learn")
            if not prompt and not any(response.mask[1:]):
                return Encoded(None, "a response of one token without a prompt, which nothing predicts")
        return Encoded(Pair(prompt, **responses), "", cut_prompt, bool(overlong))

    def _end_of(self, prompt: list[int]) -> list[int]:
        """The end of a prompt that is too long, behind its beginning token if it has one."""
        limit = self.options.max_prompt_length
        if len(prompt) <= limit:
            return prompt
        begins = prompt[0] == self.tokenizer.bos_token_id and limit > 1
        kept = limit - begins
        return [*prompt[:begins], *prompt[len(prompt) - kept :]]


@dataclass
class IdEncoder(Encoder):
    """For rows that hold token ids.

    Attributes:
        token_columns: names of numbers per response token that the rows have.
    """

    token_columns: tuple[str, ...] = ()
    _suffix = "_ids"

    def _rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        return [row]

    def _checked(self, row: dict[str, Any]) -> dict[str, Any]:
        check_ids("prompt_ids", row["prompt_ids"], len(self.tokenizer))
        for side in RESPONSES:
            check_ids(f"{side}_ids", row[f"{side}_ids"], len(self.tokenizer))
            names = [*self.token_columns, *(["mask"] if row.get(f"{side}_mask") is not None else [])]
            for name in names:
                check_token_column(f"{side}_{name}", row[f"{side}_{name}"], len(row[f"{side}_ids"]))
        return row

    def _split(self, row: dict[str, Any]) -> dict[str, Any]:
        return row

    def _says_nothing(self, row: dict[str, Any], side: str) -> bool:
        return False

    def _whole(self, row: dict[str, Any]) -> Pair:
        responses = []
        for side in RESPONSES:
            ids, mask = row[f"{side}_ids"], row.get(f"{side}_mask")
            columns = {name: row[f"{side}_{name}"] for name in self.token_columns}
            mask = [True] * len(ids) if mask is None else list(map(bool, mask))
            responses.append(Response(ids, mask, columns=columns))
        return Pair(row["prompt_ids"], *responses)
