"""Safetensors files and JSON that nobody vouches for: opened, and their headers checked, before anything uses them."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from secateur._errors import FormatError

_MAX_HEADER = 100_000_000  # bytes, safetensors' own limit
_DAMAGED = "The file is damaged, or was changed: copy it again, or make it again from the dense model."


@contextmanager
def open_safetensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file for reading tensor by tensor.

    Raises:
        FormatError: the file is missing, truncated or not a safetensors file.
    """
    _check_readable(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} is not a readable safetensors file: {error}.") from None


def read_header(path: Path) -> tuple[set[str], dict[str, str]]:
    """Return the names of the tensors in a safetensors file, and its metadata, after checking that the file is whole.

    safetensors checks the same when it opens the file. The errors here say where the file is wrong and by how much.

    Raises:
        FormatError: the file is missing, truncated or not a safetensors file.
    """

    def wrong(what: str) -> NoReturn:
        raise FormatError(f"{path} is not a readable safetensors file: {what}. {_DAMAGED}")

    _check_readable(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            if len(start) < 8:
                wrong(f"it is truncated to {len(start)} bytes")
            (length,) = struct.unpack("<Q", start)
            if length > _MAX_HEADER:
                wrong(f"its header would have {length:,} bytes; at most {_MAX_HEADER:,} are allowed")
            if length > size - 8:
                wrong(f"it is truncated: it has {size:,} bytes, its header alone {length + 8:,}")
            text = file.read(length)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from None
    header = parse_header(path, text)
    entries = header.pop("__metadata__", {})
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        wrong("its metadata is not a table of texts")
    end = 0
    for name, tensor in sorted(header.items(), key=lambda item: _offsets(item[1]) or (0, 0)):
        offsets = _offsets(tensor)
        if offsets is None:
            wrong(f"tensor {name!r} has no valid data_offsets")
        if offsets[0] != end:
            wrong(f"tensor {name!r} {'overlaps' if offsets[0] < end else 'leaves a gap after'} the one before it")
        end = offsets[1]
    if end > size - 8 - length:
        wrong(f"it is truncated: it has {size:,} bytes, but should have {8 + length + end:,}")
    if end < size - 8 - length:
        wrong(f"it has {size - 8 - length - end:,} bytes more than its tensors")
    return set(header), entries


def _check_readable(path: Path) -> None:
    """safetensors calls every file missing that it cannot open, and nobody should wait for a named pipe."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise FormatError(f"{path} is not a readable safetensors file: it is no regular file.")
        path.open("rb").close()
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from None


def parse_header(path: Path, text: str | bytes) -> dict[str, Any]:
    """Return the JSON object in a header. A key that is given twice is refused: two readers might take different ones.

    Args:
        path: of the file, for errors.
        text: JSON, in UTF-8 if it is bytes.

    Raises:
        FormatError: it is not a JSON object, has a key twice, or a number that is not finite.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key is there twice")
        return table

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text  # json would guess the encoding
        table = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
        json.dumps(table, allow_nan=False)  # a number such as 1e999 reads as infinity
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} has a header that is not readable JSON: {error}. {_DAMAGED}") from None
    if not isinstance(table, dict):
        raise FormatError(f"{path} has a header that is a {type(table).__name__}, not a JSON object. {_DAMAGED}")
    return table


def _offsets(tensor: Any) -> tuple[int, int] | None:
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        return None
    begin, end = offsets
    return (begin, end) if 0 <= begin <= end else None
