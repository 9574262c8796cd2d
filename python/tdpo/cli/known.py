"""The options that a command knows: names, types, choices and defaults, one list for flags and files alike.

Those of transformers' TrainingArguments are read from its source text: importing it takes seconds, for which a mistyped
flag need not wait.
"""

from __future__ import annotations

import ast
import builtins
import functools
import re
import typing
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_PLAIN = (bool, int, float, str, list, dict)
# What TrainingArguments calls a text and `tdpo train` takes as true or false too.
_ALSO_BOOLEAN = ("resume_from_checkpoint",)


@dataclass(frozen=True)
class Known:
    """An option.

    Attributes:
        name: its name.
        kinds: the types of its values, of bool, int, float, str, list (of texts) and dict; none where values can be
            made in Python only.
        choices: the texts allowed; empty where any is.
        default: its default, where it is known without importing transformers.
    """

    name: str
    kinds: frozenset[type]
    choices: tuple[str, ...]
    default: Any


def known_options(option_classes: Iterable[Any]) -> dict[str, Known]:
    """The options of some dataclasses and of transformers' TrainingArguments, by name; of equal names the first."""
    ours = (option for options in option_classes for option in _of_class(options))
    known: dict[str, Known] = {}
    for option in (*ours, *_of_training_arguments()):
        known.setdefault(option.name, option)
    return known


def of_class(options: Any) -> dict[str, Known]:
    """The options of a dataclass by name."""
    return {option.name: option for option in _of_class(options)}


def _of_class(options: Any) -> Iterator[Known]:
    hints = get_type_hints(options)
    for item in fields(options):
        if item.init:
            default = item.default if item.default_factory is MISSING else item.default_factory()
            yield _known(item.name, hints[item.name], default, item.metadata)


@functools.cache
def _of_training_arguments() -> list[Known]:
    try:
        found = list(_read_training_arguments())
    except (OSError, SyntaxError, ValueError, LookupError, TypeError):  # a release that is written in another way
        found = []
    if len(found) > 50:
        return found
    from transformers import TrainingArguments

    return list(_of_class(TrainingArguments))


def _known(name: str, hint: Any, default: Any, metadata: Any) -> Known:
    members = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    kinds, choices = set(), list(metadata.get("choices") or ())
    for member in members:
        kind = get_origin(member) or member
        if kind is Literal:
            kinds |= {type(value) for value in get_args(member)}
            choices += [value for value in get_args(member) if isinstance(value, str)]
        elif isinstance(kind, type) and issubclass(kind, Enum):
            kinds.add(str)
            choices += [choice.value for choice in kind]
        elif kind is not NoneType:
            kinds.add(kind)
    if metadata.get("const") is True or name in _ALSO_BOOLEAN:
        kinds.add(bool)
    if list in kinds:  # of texts that are checked where they are used
        choices = []
    return Known(name, frozenset(kinds.intersection(_PLAIN)), tuple(choices), default)


# ---- the source text of TrainingArguments ----


def _read_training_arguments() -> Iterator[Known]:
    """The fields as they are written there."""
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        raise LookupError("transformers")
    folder = Path(spec.submodule_search_locations[0])
    text = (folder / "training_args.py").read_text(encoding="utf-8")
    names = _Names(folder, text)
    for statement in _class_body(text, "TrainingArguments"):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
            continue
        hint = eval(compile(ast.Expression(statement.annotation), "training_args.py", "eval"), {}, names)
        given = {}
        if isinstance(statement.value, ast.Call):  # of `field`
            given = {keyword.arg: _literal(keyword.value) for keyword in statement.value.keywords}
            if any(map(_makes_a_list, statement.value.keywords)):
                given["default"] = []
        elif statement.value is not None:
            given = {"default": _literal(statement.value)}
        yield _known(statement.target.id, hint, given.get("default"), given.get("metadata") or {})


def _makes_a_list(keyword: ast.keyword) -> bool:
    return keyword.arg == "default_factory" and isinstance(keyword.value, ast.Name) and keyword.value.id == "list"


class _Names(dict):
    """What the annotations of TrainingArguments name: types, and enumerations as they are written."""

    def __init__(self, folder: Path, text: str) -> None:
        super().__init__()
        self.folder, self.text = folder, text

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) or hasattr(typing, name):
            return getattr(builtins, name, None) or getattr(typing, name)
        return self.setdefault(name, self._enumeration(name) or type(name, (), {}))

    def _enumeration(self, name: str) -> Any:
        """An enumeration of texts; None where it is another class."""
        imported = re.search(rf"^from \.(\w+) import \(?[^()]*?\b{name}\b", self.text, re.MULTILINE)
        text = (self.folder / f"{imported[1]}.py").read_text(encoding="utf-8") if imported else self.text
        body = _class_body(text, name)
        values = {
            item.targets[0].id: _literal(item.value)
            for item in body
            if isinstance(item, ast.Assign) and isinstance(item.targets[0], ast.Name)
        }
        return Enum(name, values) if values else None  # type: ignore[misc]


def _class_body(text: str, name: str) -> list[ast.stmt]:
    """The statements of a class before its first method: parsing all of a long file would take a tenth of a second."""
    found = re.search(rf"^class {name}\b[^\n]*\n.*?(?=^    def |^    @|^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    if found is None:
        return []
    (definition,) = ast.parse(found[0]).body
    assert isinstance(definition, ast.ClassDef)
    return definition.body


def _literal(node: ast.expr) -> Any:
    """The value of an expression; None where it is computed."""
    if isinstance(node, ast.Dict):  # whose other entries may be computed
        entries = zip(node.keys, node.values)
        return {_literal(key): _literal(value) for key, value in entries if key is not None}
    try:
        return ast.literal_eval(node)
    except ValueError:
        return None
