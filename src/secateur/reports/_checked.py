"""Is a report that was read from a file what its fields say? A file is not trusted."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


def checked(value: T) -> T:
    """Return a dataclass whose fields have values of their types.

    Types are plain ones, other dataclasses, tuples and mappings of these, and unions. An int counts as a float.

    Raises:
        ValueError: naming the first field that has something else.
    """
    kind: type = type(value)
    hints = _hints(kind)
    for entry in fields(value):  # type: ignore[arg-type]
        found = getattr(value, entry.name)
        if not _fits(found, hints[entry.name]):
            raise ValueError(f"{entry.name} must be {_text(hints[entry.name])}, got {repr(found)[:60]}")
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _text(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("collections.abc.", "")


def _fits(value: object, hint: Any) -> bool:
    if hint is Any:
        return True
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_fits(part, arguments[0]) for part in value)
        return len(value) == len(arguments) and all(map(_fits, value, arguments))
    if origin is Mapping:
        return isinstance(value, Mapping) and all(
            _fits(key, arguments[0]) and _fits(part, arguments[1]) for key, part in value.items()
        )
    if hint in (int, float):
        return not isinstance(value, bool) and isinstance(value, int | hint)
    return isinstance(value, hint)
