"""Is a value of a recipe what it should be? One sentence for each mistake."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from secateur._checks import instance, integer, known_keys
from secateur._errors import RecipeError
from secateur.huggingface import CalibrationText

Check: TypeAlias = Callable[[str, object], Any]


def text(name: str, value: object) -> str:
    """Return the value if it is a text."""
    return instance(name, value, str, "a text")


def texts(name: str, value: object) -> list[str]:
    """Return a text, or a list of them, as a list."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
        raise TypeError(f"{name} must be a text or a list of texts, got {value!r:.60}")
    return found


def table(name: str, value: object) -> Mapping[str, Any]:
    """Return the value if it is a table."""
    return instance(name, value, dict, "a table")


def integers(name: str, value: object) -> list[int]:
    """Return the value if it is a list of whole numbers."""
    return [integer(f"a number in {name}", entry) for entry in instance(name, value, list, "a list of whole numbers")]


def of(kind: type, what: str) -> Check:
    """Return a check that a value is of a type of TOML; a whole number is a number, too."""

    def check(name: str, value: object) -> object:
        right = isinstance(value, (int, float) if kind is float else kind) and (
            kind is bool or not isinstance(value, bool)
        )
        if not right:
            raise TypeError(f"{name} must be {what}, got {_of_toml(value)}")
        return value

    return check


whole, number, flag = of(int, "a whole number"), of(float, "a number"), of(bool, "true or false")


def numbers(name: str, value: object) -> list[float]:
    """Return the value if it is a list of numbers."""
    found = instance(name, value, list, "a list of numbers")
    for entry in found:
        number(f"an entry of {name}", entry)
    return found


def text_or_table(name: str, value: object) -> object:
    """Return the value if it is a text or a table."""
    if not isinstance(value, str | dict):
        raise TypeError(f"{name} must be a text or a table, got {_of_toml(value)}")
    return value


def calibration(folder: Path, seed: int) -> Callable[[object], tuple[CalibrationText, bool]]:
    """Return what reads ``calibration``: a file, or a table of it and how much of it is read.

    Args:
        folder: to which paths are relative.
        seed: where the table has none.

    Returns:
        A function of the value, which gives the text and whether a number of samples was asked for.
    """
    keys: dict[str, Check] = {"file": text, "samples": whole, "sequence_length": whole, "seed": whole, "select": text}

    def read(value: object) -> tuple[CalibrationText, bool]:
        found = {"file": value} if isinstance(value, str) else dict(table("calibration", value))
        known_keys("table calibration", found, keys)
        if "file" not in found:
            raise RecipeError("the table calibration has no file. Give one: calibration = { file = 'text.txt' }.")
        found = {key: keys[key](f"calibration.{key}", entry) for key, entry in found.items()}
        for key, least in (("samples", 1), ("sequence_length", 16), ("seed", 0)):
            integer(f"calibration.{key}", found.get(key, least), least)
        path = folder / found.pop("file")
        return CalibrationText(path, **{"seed": seed, **found}), "samples" in found

    return read


def shapes(value: object) -> tuple[tuple[int, int], ...]:
    """Return shapes of inputs such as ``"8x64"``: how many texts, and tokens in each."""
    found = []
    for shape in texts("shapes", value):
        sizes = shape.split("x")
        if len(sizes) != 2 or not all(size.isdecimal() and size.isascii() and 0 < int(size) < 1e6 for size in sizes):
            raise RecipeError(
                f"a shape is how many texts and how many tokens in each, such as '8x64', got {shape!r:.40}."
            )
        found.append((int(sizes[0]), int(sizes[1])))
    return tuple(dict.fromkeys(found))


def files(folder: Path, name: str, value: object) -> tuple[Path, ...]:
    """Return paths to files, relative to a folder."""
    return tuple(folder / entry for entry in texts(name, value))


def checked(
    where: str, given: Mapping[str, object], keys: Mapping[str, Check], also: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the values of a table, each checked; keys that are not known are refused."""
    known_keys(where, given, [*keys, *also])
    return {key: keys[key](key, value) for key, value in given.items() if key in keys}


def _of_toml(value: object) -> str:
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "a table",
    }
    return f"{words.get(type(value), type(value).__name__)} ({value!r:.40})"
