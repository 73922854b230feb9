"""Paths and JSON that nobody vouches for: looked at without a wait, and read without surprises."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from secateur._errors import FormatError


def is_there(path: Path) -> bool:
    """Return whether a path exists, where a file that may not be looked at is not called missing.

    Raises:
        FormatError: the path cannot be looked at, or is neither a file nor a directory.
    """
    with reading(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            return False
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise FormatError(f"{path} is neither a file nor a directory, and is not read.")
    return True


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Name the path in the errors of the system that are raised inside."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FormatError: it cannot be read, or is no JSON object.
    """
    with reading(path):
        content = path.read_bytes()
    try:
        table = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not readable JSON: {error}.") from None
    if not isinstance(table, dict):
        raise FormatError(f"{path} should hold a JSON object, but holds a {type(table).__name__}.")
    return table
