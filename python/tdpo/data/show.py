"""What will be trained on, as text for a terminal: counts, lengths, and the first pairs token by token."""

from __future__ import annotations

import re
import textwrap
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

from datasets import Dataset
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase

from tdpo_ext import checks

from ..options import RowOptions
from .collator import Sequence
from .rows import RESPONSES
from .summary import Summary

_LEGEND = (
    "Tokens stand apart; within one, · is a space, \\n a new line, \\xe6 a byte of a character. The loss is of the "
    "tokens of chosen and rejected; prompt and context (turns of others within a response) are only read."
)
_NO_PROMPT = "(no tokens: nothing predicts the first of a response, which is context)"
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a token of SentencePiece's byte fallback
_BOLD, _DIM, _DIM_ITALIC = "1", "2", "2;3"
_SHADES = {  # of one token and the next
    "prompt": (_DIM, _DIM),
    "context": (_DIM_ITALIC, _DIM_ITALIC),
    "chosen": ("32", "1;32"),
    "rejected": ("31", "1;31"),
    "": ("", ""),
}


@dataclass(frozen=True)
class View:
    """How pairs are shown.

    Attributes:
        rows: how many.
        tokens: how many of a prompt or of a response at most, at least 2; of longer ones the middle is left out.
        width: of lines, in characters.
        colours: whether to use those of a terminal.
    """

    rows: int
    tokens: int
    width: int = 100
    colours: bool = False

    def __post_init__(self) -> None:
        checks.integer("show_rows", self.rows, least=0)
        checks.integer("show_tokens", self.tokens, least=2)

    def painted(self, text: str, codes: str) -> str:
        """A text in colours, given by the parameters of an ANSI escape sequence."""
        return f"\x1b[{codes}m{text}\x1b[0m" if self.colours and codes else text


def data_text(
    title: str,
    dataset: Dataset,
    summary: Summary,
    tokenizer: PreTrainedTokenizerBase,
    options: RowOptions,
    view: View,
) -> str:
    """A data set as `tokenize_rows` returns it, with its summary: counts, lengths and its first pairs."""
    blocks = [view.painted(title, _BOLD), summary_text(summary, options)]
    rows = dataset.select(range(min(view.rows, len(dataset))))
    if len(rows):
        first = "pair" if len(rows) == 1 else f"{len(rows):,} pairs"
        blocks.append(f"The first {first} of {len(dataset):,}, token by token:")
    return "\n\n".join([*blocks, *(pair_text(row, tokenizer, view) for row in rows)])


def legend_text(view: View) -> str:
    """How to read the tokens of `data_text`."""
    return textwrap.fill(_LEGEND, view.width)


def summary_text(summary: Summary, options: RowOptions) -> str:
    """What became of the rows, and how long their tokens are."""
    responses = int(summary.chosen.sum() + summary.rejected.sum())
    facts = {
        "rows": [f"{summary.rows:,}"],
        "pairs": [f"{summary.pairs:,}"],
        "dropped": [f"{count:,} with {reason}" for reason, count in summary.dropped.most_common()] or ["none"],
        "prompts cut": [f"{summary.cut_prompts:,} (max_prompt_length {options.max_prompt_length:,})"],
        "responses cut": [f"in {_counted(summary.cut_responses, 'pair')} (max_length {options.max_length:,})"],
        "context": [f"{summary.context:,} of {responses:,} response tokens"],
    }
    lines = [
        f"  {'' if place else name:<13}  {fact}" for name, some in facts.items() for place, fact in enumerate(some)
    ]
    return "\n".join(lines) + f"\n\n{summary.table()}\n\n{summary.histogram(options.max_length)}"


def pair_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, view: View) -> str:
    """A row of a tokenized data set, token by token: every part behind its name."""
    prompt = row["prompt_ids"]
    parts = [*_parts("prompt", prompt, [True] * len(prompt), tokenizer, view)] or [_Part("prompt", [_NO_PROMPT])]
    lengths = [f"prompt {_counted(len(prompt), 'token')}"]
    for side in RESPONSES:
        sequence = Sequence.of(row, side)
        learned = set(sequence.learned)
        ids = sequence.ids[sequence.prompt :]
        mask = [sequence.prompt + place in learned for place in range(len(ids))]
        parts += _parts(side, ids, mask, tokenizer, view)
        context = mask.count(False)
        lengths.append(f"{side} {len(ids):,}" + (f" ({context:,} of them context)" if context else ""))
    head = view.painted(f"row {row['dataset_row']}: {', '.join(lengths)}", _BOLD)
    return "\n".join([head, *(line for part in parts for line in part.lines(view))])


def token_text(token: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """A token in printable characters without blanks; what can't be printed, and a part of a character, is escaped."""
    name: str | None = tokenizer.convert_ids_to_tokens([token])[0]
    if name is None:
        return f"<token {token}>"
    text = tokenizer.batch_decode([[token]], clean_up_tokenization_spaces=False)[0]
    if "\N{REPLACEMENT CHARACTER}" in text:
        text = _text_of_bytes(name)
    if name.startswith("▁") and not text.startswith(" "):  # SentencePiece's space, lost where a text begins
        text = f" {text}"
    shown = "".join(map(_printable, text or name))
    return f"◌{shown}" if unicodedata.category(shown[0]).startswith("M") else shown  # an accent needs a letter


class _Part(NamedTuple):
    """Tokens in a row that belong together, by their texts; or what is said instead of those that are left out."""

    name: str
    texts: list[str]

    def lines(self, view: View) -> list[str]:
        """Lines with a margin that names the part."""
        lines: list[list[str]] = []
        room = 0
        for place, text in enumerate(self.texts):
            needed = _columns(text) + 1
            if not lines or needed > room:
                lines.append([])
                room = view.width - len(_margin(""))
            room -= needed
            lines[-1].append(view.painted(text, _SHADES[self.name][place % 2]))
        return [_margin("" if place else self.name) + " ".join(line) for place, line in enumerate(lines)]


def _margin(name: str) -> str:
    return f"  {name:<8} │ "


def _parts(
    name: str, ids: list[int], learned: list[bool], tokenizer: PreTrainedTokenizerBase, view: View
) -> Iterator[_Part]:
    """A prompt or a response in parts: what is learned and what is context, and what is left out in the middle."""
    left_out = range(-(-view.tokens // 2), len(ids) - view.tokens // 2)
    names = ["" if place in left_out else name if learned[place] else "context" for place in range(len(ids))]
    for part, group in groupby(range(len(ids)), key=names.__getitem__):
        places = list(group)
        if part:
            yield _Part(part, [token_text(ids[place], tokenizer) for place in places])
        else:
            yield _Part("", [f"… {_counted(len(places), 'token')} left out …"])


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _printable(character: str) -> str:
    if character == " ":
        return "·"
    if character == "\\":
        return "\\\\"
    if "\udc80" <= character <= "\udcff":  # a byte, as Python decodes those that are no text
        return f"\\x{ord(character) - 0xDC00:02x}"
    if character.isprintable() and character != "·":
        return character
    return character.encode("unicode_escape").decode()


def _columns(text: str) -> int:
    """How many columns of a terminal a text takes."""
    return sum(
        0 if unicodedata.category(character) in ("Mn", "Me") else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in text
    )


def _bytes_by_character() -> dict[str, int]:
    """The bytes that the characters of byte-level tokens mean: the printable ones themselves, the others in order."""
    alphabet = sorted(ByteLevel.alphabet())
    themselves = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(themselves.values()))
    return themselves | dict(zip(alphabet[len(themselves) :], others))


_BYTES = _bytes_by_character()


def _text_of_bytes(name: str) -> str:
    """The text of a token that holds bytes, with surrogates for those that are no text alone; of others, their name."""
    byte = _BYTE.fullmatch(name)
    if byte is None and not all(character in _BYTES for character in name):
        return name
    content = bytes(_BYTES[character] for character in name) if byte is None else bytes.fromhex(byte[1])
    return content.decode("utf-8", "surrogateescape")
