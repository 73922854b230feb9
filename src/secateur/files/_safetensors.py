"""Safetensors files and JSON that nobody vouches for: opened, and their headers checked, before anything uses them."""

from __future__ import annotations

import gc
import json
import math
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
# A header takes up to 30 times its bytes in memory, and a second for each 20,000 tensors. So it may be long only where
# the tensors are long, too: a MiB for any file, and one byte more for every 8 bytes of tensors.
_FREE_HEADER, _TENSOR_BYTES = 1 << 20, 8
MAX_NAME = 1000  # characters
_MAX_DIGITS = 300  # of an integer: Python has a limit, too, which sums and products of such integers stay far below
_MAX_DIMENSIONS, _MAX_ELEMENTS = 64, 1 << 48  # of a tensor, for which a side of 0 counts as 1
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
            if length > (most := _longest_header(size - 8 - length)):
                wrong(
                    f"its header has {length:,} bytes for {size - 8 - length:,} of tensors; at most {most:,} are read"
                )
            text = file.read(length)
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.") from None
    header = parse_header(path, text)
    entries = header.pop("__metadata__", {})
    if not isinstance(entries, dict) or not all(isinstance(value, str) for value in entries.values()):
        wrong("its metadata is not a table of texts")
    end = 0
    places = []
    for name, tensor in header.items():
        offsets = _offsets(tensor)
        if len(name) > MAX_NAME:
            wrong(f"a tensor has a name of {len(name):,} characters, {name[:40]!r}...; at most {MAX_NAME:,} are read")
        if offsets is None:
            wrong(f"tensor {name!r} has no valid data_offsets")
        if not _is_shape(tensor.get("shape")):
            wrong(f"tensor {name!r} has no valid shape")
        places.append((*offsets, name))
    for begin, stop, name in sorted(places):
        if begin != end:
            wrong(f"tensor {name!r} {'overlaps' if begin < end else 'leaves a gap after'} the one before it")
        end = stop
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
        FormatError: it is not a JSON object, has a key twice, a number that is not finite, or one of very many digits.
    """
    try:
        table = parse_json(text.decode("utf-8") if isinstance(text, bytes) else text)  # json would guess the encoding
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} has a header that is not readable JSON: {error}. {_DAMAGED}") from None
    if not isinstance(table, dict):
        raise FormatError(f"{path} has a header that is a {type(table).__name__}, not a JSON object. {_DAMAGED}")
    return table


def parse_json(text: str) -> Any:
    """Return the value of a JSON text whose keys are all different and whose numbers are finite and of bounded size.

    Raises:
        ValueError: it is not such a text. Also ``RecursionError``.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key is there twice")
        return table

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON")

    def integer(digits: str) -> int:
        if len(digits) > _MAX_DIGITS:
            raise ValueError(f"an integer has {len(digits):,} digits; at most {_MAX_DIGITS} are read")
        return int(digits)

    def number(digits: str) -> float:
        found = float(digits)
        if math.isinf(found):  # such as 1e999
            raise ValueError(f"the number {digits[:40]} is beyond the range of float64")
        return found

    # Each new table and list counts towards the next garbage collection, and each collection looks at all objects of
    # the process: the collections would take most of the time.
    collects = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse, parse_int=integer, parse_float=number)
    finally:
        if collects:
            gc.enable()


def check_header_length(path: Path) -> None:
    """Raise unless :func:`read_header` would read the header of a file that was just written.

    Raises:
        FormatError: the header is too long for the tensors.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
    if length > (most := _longest_header(size - 8 - length)):
        raise FormatError(
            f"{path} would have a header of {length:,} bytes for {size - 8 - length:,} bytes of tensors, and no file "
            f"with more than {most:,} is read. Store fewer and larger tensors, or less metadata."
        )


def _longest_header(tensor_bytes: int) -> int:
    return min(_MAX_HEADER, _FREE_HEADER + tensor_bytes // _TENSOR_BYTES)


def _is_shape(shape: Any) -> bool:
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        return False
    elements = 1
    for side in shape:
        if type(side) is not int or side < 0:
            return False
        elements *= side or 1
        if elements > _MAX_ELEMENTS:
            return False
    return True


def _offsets(tensor: Any) -> tuple[int, int] | None:
    offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
    if not isinstance(offsets, list) or [type(offset) for offset in offsets] != [int, int]:
        return None
    begin, end = offsets
    return (begin, end) if 0 <= begin <= end else None
