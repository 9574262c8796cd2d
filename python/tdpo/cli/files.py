"""YAML files of options, read as people write them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

_NULL = "tag:yaml.org,2002:null"
_FLOAT = "tag:yaml.org,2002:float"


class Line(NamedTuple):
    """An option of a file.

    Attributes:
        name: its name.
        value: what YAML makes of it.
        written: as it is written; of a list, its items as they are written; None for a mapping.
    """

    name: str
    value: Any
    written: str | list[Any] | None


class _Loader(yaml.SafeLoader):
    """YAML 1.1, as PyYAML reads it, but for numbers like 1e-5, which it would take for texts."""


_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def read_options(path: Path) -> list[Line]:
    """The options of a file that are not null, which leaves the default.

    Raises:
        ValueError: it is missing, no YAML, or no mapping of options to values, or it gives one twice.
    """
    if not path.is_file():
        raise ValueError(f"the configuration file {path} does not exist")
    try:
        return list(_lines(path, path.read_bytes()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the configuration file {path} is not valid YAML: {reason}") from error


def _lines(path: Path, content: bytes) -> Iterator[Line]:
    loader = _Loader(content)
    root = loader.get_single_node()
    if root is None or root.tag == _NULL:
        return
    if not isinstance(root, yaml.MappingNode):
        raise ValueError(f"the configuration file {path} holds no mapping of options to values")
    given = [key.value for key, _ in root.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
    for name in given:
        if given.count(name) > 1:
            raise ValueError(f"{path}: {name} is given twice")
    loader.flatten_mapping(root)
    lines = {}  # of options that come from an anchor too, what the file itself says is last
    for key, node in root.value:
        value = loader.construct_object(node, deep=True)
        lines[str(key.value)] = Line(str(key.value), value, _written(node, value))
    yield from (line for line in lines.values() if line.value is not None)


def _written(node: yaml.Node, value: Any) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_written(item, inner) for item, inner in zip(node.value, value)]
    return node.value if isinstance(node, yaml.ScalarNode) and value is not None else None
