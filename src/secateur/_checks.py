"""Checks of arguments: one sentence for each mistake, the same wherever it is made."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from secateur._errors import RecipeError

T = TypeVar("T")


def instance(name: str, value: object, kind: type[T], what: str = "") -> T:
    """Return the value if it is of that class.

    Args:
        name: of the argument.
        value: that was given.
        kind: a class.
        what: how to call the class in the message, by default ``"a <its name>"``.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be {what or f'a {kind.__name__}'}, got {type(value).__name__}")
    return value


def flag(name: str, value: object) -> bool:
    """Return the value if it is a bool."""
    return instance(name, value, bool)


def integer(name: str, value: object, least: int | None = None) -> int:
    """Return the value if it is an int, and not below ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise RecipeError(f"{name} must be at least {least}, got {value}.")
    return value


def number(
    name: str,
    value: object,
    least: float = -math.inf,
    most: float = math.inf,
    *,
    above: float | None = None,
    finite: bool = False,
) -> float:
    """Return the value as a float if it is a number in ``[least, most]``, and above ``above``. NaN is refused.

    An infinite value is in the range only if a limit is that infinity, and never if ``finite``.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        hint = f"; pass float({name})" if hasattr(value, "item") else ""
        raise TypeError(f"{name} must be a number, got {type(value).__name__}{hint}")
    if math.isnan(value):
        raise RecipeError(f"{name} must be a number, got NaN.")
    if finite and math.isinf(value):
        raise RecipeError(f"{name} must be finite, got {value:g}.")
    if above is not None and not above < value <= most:
        raise RecipeError(f"{name} must be {_range(above, most, 'above')}, got {value:g}.")
    if not least <= value <= most:
        raise RecipeError(f"{name} must be {_range(least, most, 'at least')}, got {value:g}.")
    return float(value)


def _range(low: float, high: float, word: str) -> str:
    parts = [f"{word} {low:g}"] if low > -math.inf else []
    parts += [f"at most {high:g}"] if high < math.inf else []
    return " and ".join(parts)


def fraction(name: str, value: object) -> float:
    """Return the value as a float if it is a number in [0, 1]."""
    found = number(name, value)
    if not 0 <= found <= 1:
        raise RecipeError(f"{name} is a part of a whole, between 0 and 1, got {found:g}.")
    return found


def pair(name: str, value: object) -> tuple[float, float]:
    """Return the value as two floats if it is a tuple or list of two numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    return number(name, value[0]), number(name, value[1])


def one_of(what: str, value: object, valid: Iterable[str]) -> str:
    """Return the value if it is among the valid names; else say which are, and which one was probably meant."""
    names = list(valid)
    if not isinstance(value, str) or value not in names:
        raise RecipeError(f"unknown {what} {value!r}{_hint(value, names)} Valid are {', '.join(names)}.")
    return value


def known_keys(where: str, table: Iterable[str], valid: Iterable[str]) -> None:
    """Raise unless every key of a table is valid."""
    names = list(valid)
    for key in table:
        if key not in names:
            near = _hint(key, names)
            raise RecipeError(f"unknown key {key!r} in the {where}{near or '.'} Valid are {', '.join(names)}.")


def _hint(value: object, names: list[str]) -> str:
    near = difflib.get_close_matches(value, names, 1, 0.5) if isinstance(value, str) else []
    return f"; did you mean {near[0]!r}?" if near else "."


def globs(name: str, value: Any) -> tuple[str, ...]:
    """Return glob patterns as a tuple. A lone string is one glob, not its letters."""
    found = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    if not all(isinstance(glob, str) for glob in found):
        raise TypeError(f"{name} must be glob patterns (str), got {value!r}")
    return found


def settings(name: str, value: T | None, made: type[T], keywords: Mapping[str, object]) -> T:
    """Return the settings that a caller gave: as one value, or as keywords from which the value is made.

    Args:
        name: of the argument that takes the value.
        value: that was given, or None.
        made: class of the value; the names of its parameters are those of the keywords.
        keywords: that were given; None where one was left out.

    Raises:
        RecipeError: both were given.
    """
    given = {key: keyword for key, keyword in keywords.items() if keyword is not None}
    if value is None:
        return made(**given)
    instance(name, value, made)
    if given:
        raise RecipeError(f"pass either a {name} or settings, not both; got a {name} and {', '.join(given)}.")
    return value
