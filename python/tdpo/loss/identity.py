"""What a user's own objective is called in run.json, so that a run is not resumed with another."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

import xxhash

from tdpo_ext import MarginLoss
from tdpo_ext.losses import Objective

_DEPTH = 5  # of values bound to values, which may form circles


def objective_name(objective: Objective) -> str:
    """Where an objective is defined, what is bound to it, and a digest of its code; the same in every process.

    What it reads of its module, and the functions that it calls there, are no part of it.
    """
    return _name(objective, _DEPTH)


def _name(value: Any, depth: int) -> str:
    """The name of a function, or of a value bound to one. No repr of objects, which may hold their addresses."""
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None))):
        return repr(value)
    kind = value if hasattr(value, "__qualname__") else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if depth == 0 or isinstance(value, (type, BuiltinFunctionType)):
        return name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_name(item, depth - 1) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{_assigned(value, depth)}}}"
    if isinstance(value, MarginLoss):
        return f"MarginLoss({_assigned(vars(value), depth)})"
    if isinstance(value, functools.partial):
        arguments: dict[Any, Any] = {**dict(enumerate(value.args)), **value.keywords}
        return f"{_name(value.func, depth - 1)}({_assigned(arguments, depth)})"
    if isinstance(value, MethodType):
        return f"{_name(value.__func__, depth - 1)}({_name(value.__self__, depth - 1)})"
    function = value if isinstance(value, FunctionType) else vars(type(value)).get("__call__")
    bound = _bound_to(value) if isinstance(value, FunctionType) else getattr(value, "__dict__", {})
    code = getattr(function, "__code__", None)
    digest = "" if code is None else f" #{xxhash.xxh3_64(_text(code).encode()).hexdigest()[:8]}"
    return f"{name}({_assigned(bound, depth)}){digest}"


def _assigned(values: Mapping[Any, Any], depth: int) -> str:
    return ", ".join(f"{name}={_name(value, depth - 1)}" for name, value in values.items())


def _bound_to(function: FunctionType) -> dict[str, Any]:
    """What a function has from where it was defined: its closure and its default arguments."""
    code, defaults = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[: code.co_argcount]
    closure = zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__ or ()))
    return {
        **dict(closure),
        **dict(zip(names[len(names) - len(defaults) :], defaults)),
        **(function.__kwdefaults__ or {}),
    }


def _text(code: CodeType) -> str:
    """What a function does, without its place in a file."""
    constants = []
    for value in code.co_consts:
        if isinstance(value, frozenset):
            value = sorted(map(repr, value))  # a set's own order differs between processes
        constants.append(_text(value) if isinstance(value, CodeType) else repr(value))
    return f"{code.co_code.hex()} {constants} {code.co_names}"
