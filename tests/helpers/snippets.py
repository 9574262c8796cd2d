"""The fenced blocks of a page, and the commands of those for a shell."""

import re
import shlex
from typing import NamedTuple

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ENDS = {"&&", "|", ";"}


class Snippet(NamedTuple):
    language: str
    text: str
    line: int  # of the page

    @property
    def commands(self):
        """Lists of words: continued lines joined, comments and assignments left out."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [command for line in lines if not re.match(r"\w+=", line) for command in _commands(line)]


def snippets(page):
    """The fenced blocks of a page that name a language."""
    return [Snippet(m[1], m[2], page[: m.start()].count("\n") + 2) for m in _BLOCK.finditer(page)]


def _commands(line):
    command = []
    for word in [*shlex.split(line, comments=True), ";"]:
        if word not in _ENDS:
            command.append(word)
        elif command:
            yield command
            command = []
