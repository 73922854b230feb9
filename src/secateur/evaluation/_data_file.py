"""Files to measure on: plain text, JSON lines, or CSV with a header. The fields say what a file is for."""

from __future__ import annotations

import csv
import difflib
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from secateur._errors import StatisticsError
from secateur.calibration import json_lines, read_file, read_text

Kind: TypeAlias = Literal["text", "pairs", "labels"]

# The fields of each kind of file, the more special kinds first: a file of labels has texts, too.
_FIELDS: dict[Kind, tuple[str, ...]] = {
    "pairs": ("sentence1", "sentence2", "score"),
    "labels": ("text", "label"),
    "text": ("text",),
}
_KNOWN = tuple(dict.fromkeys(field for fields in _FIELDS.values() for field in fields))
_EXPECTED = "text; text and label; or sentence1, sentence2 and score"
_LARGEST_FIELD = 1 << 24  # characters of a field of CSV


@dataclass(frozen=True)
class DataFile:
    """What a file to measure on holds.

    Args:
        path: of the file, for reports and errors.
        kind: ``"text"``, ``"pairs"`` (two sentences and a score of how alike they are), or ``"labels"`` (texts and the
            class of each).
        text: of a file of text, else empty.
        texts: of a file of labels, or the first sentences of pairs, else empty.
        others: the second sentences of pairs, else empty.
        scores: of pairs, else empty.
        labels: of a file of labels: a number, or the name of a class; else empty.
        lines: of the file, where each entry begins, for errors.
    """

    path: Path
    kind: Kind
    text: str = ""
    texts: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    labels: tuple[int | str, ...] = ()
    lines: tuple[int, ...] = ()


def read_data(path: str | Path) -> DataFile:
    """Return what a file to measure on holds.

    A file that ends in ``.jsonl`` or ``.json`` is JSON lines, one that ends in ``.csv`` is CSV in UTF-8 with a header,
    and any other is plain text. Further fields are left unread, unless their name is nearly that of a known one.

    Args:
        path: of the file.

    Raises:
        StatisticsError: the file cannot be read; or a field is missing or wrong, with the number of its line.

    Example:
        >>> import os, tempfile
        >>> from secateur.evaluation import read_data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "pairs.csv")
        ...     with open(path, "w") as file:
        ...         _ = file.write("sentence1,sentence2,score\\na cat,a dog,0.7\\na cat,a car,0.1\\n")
        ...     data = read_data(path)
        >>> data.kind, data.scores
        ('pairs', (0.7, 0.1))
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".json", ".csv"):
        return DataFile(path, "text", read_text(path))
    entries = list(_csv_lines(path) if suffix == ".csv" else _json_lines(path))
    if not entries:
        raise StatisticsError(f"{path} has no entries. Give at least one with the fields {_EXPECTED}.")
    kind = _kind(path, entries)
    for number, entry in entries:
        missing = [field for field in _FIELDS[kind] if entry.get(field) is None]
        if missing:
            raise StatisticsError(
                f"{path}, line {number}: {' and '.join(missing)} missing; the fields are "
                f"{_listed(entry)}.\nOther lines have {', '.join(_FIELDS[kind])}; give every line all of them."
            )
    lines = tuple(number for number, _ in entries)

    def texts(field: str) -> tuple[str, ...]:
        return tuple(_text(path, number, field, entry[field]) for number, entry in entries)

    if kind == "pairs":
        scores = tuple(_score(path, number, entry["score"]) for number, entry in entries)
        if len(set(scores)) < 2:
            raise StatisticsError(
                f"{path} has the score {scores[0]:g} in all {len(scores)} lines, so there is no order to compare with. "
                "Give pairs of different scores."
            )
        return DataFile(path, kind, "", texts("sentence1"), texts("sentence2"), scores, lines=lines)
    if kind == "labels":
        labels = tuple(_label(path, number, entry["label"]) for number, entry in entries)
        return DataFile(path, kind, "", texts("text"), labels=labels, lines=lines)
    text = "\n\n".join(_characters(path, number, "text", entry["text"]) for number, entry in entries)
    if not text.strip():
        raise StatisticsError(f"{path} holds no text. Give a file with text of the sort that the model was trained on.")
    return DataFile(path, kind, text, lines=lines)


def _kind(path: Path, entries: Sequence[tuple[int, Mapping[str, Any]]]) -> Kind:
    """What a file is for: the fields of all its lines together say it, so that a line without one is noticed."""
    present: dict[str, int] = {}
    for number, entry in entries:
        for field in entry:
            present.setdefault(field, number)
    for field, number in present.items():
        near = difflib.get_close_matches(field.strip().lower(), _KNOWN, 1, 0.75)
        if field not in _KNOWN and near and near[0] not in present:
            raise StatisticsError(
                f"{path}, line {number}: unknown field {field!r:.80}; did you mean {near[0]!r}? Known are {_EXPECTED}."
            )
    found: list[Kind] = [
        kind for kind in _FIELDS if any(field in present for field in _FIELDS[kind] if field != "text")
    ]
    if len(found) > 1:
        raise StatisticsError(
            f"{path} has fields of two kinds, {_listed(present)}, so what to measure is not clear. Give {_EXPECTED}."
        )
    if not found and "text" not in present:
        number, entry = entries[0]
        raise StatisticsError(f"{path}, line {number}: the fields are {_listed(entry)}; expected {_EXPECTED}.")
    return found[0] if found else "text"


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{field!r:.40}" for field in list(fields)[:8]) or "none"


def _json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, entry in json_lines(path, read_file(path)):
        if not isinstance(entry, dict):
            raise StatisticsError(
                f"{path}, line {number}: expected an object with the fields {_EXPECTED}, got a {type(entry).__name__}."
            )
        yield number, entry


def _csv_lines(path: Path) -> Iterator[tuple[int, Mapping[str, str]]]:
    reader = csv.reader(io.StringIO(read_file(path), newline=""), strict=True)
    header: list[str] = []
    begin, limit = 1, csv.field_size_limit(_LARGEST_FIELD)
    try:
        for row in reader:
            number, begin = begin, reader.line_num + 1
            if not row:
                continue
            if not header:
                header = [field.strip() for field in row]
                if len(set(header)) < len(header):
                    raise StatisticsError(f"{path}, line {number}: the header has a field twice: {', '.join(header)}.")
            elif len(row) != len(header):
                raise StatisticsError(
                    f"{path}, line {number}: {len(row)} fields, but the header has {len(header)} "
                    f"({', '.join(header):.200}). Put a field that has a comma in it in double quotes."
                )
            else:
                yield number, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise StatisticsError(f"{path}, line {begin}: not CSV: {error}.") from None
    finally:
        csv.field_size_limit(limit)


def _text(path: Path, number: int, field: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise StatisticsError(f"{path}, line {number}: {field} should be text that is not empty, got {value!r:.60}.")
    return _characters(path, number, field, value)


def _characters(path: Path, number: int, field: str, value: Any) -> str:
    if not isinstance(value, str):
        raise StatisticsError(f"{path}, line {number}: {field} should be text, got {value!r:.60}.")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise StatisticsError(f"{path}, line {number}: {field} has half of a surrogate pair, which is not a character.")
    return value


def _score(path: Path, number: int, value: Any) -> float:
    try:
        score = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise StatisticsError(f"{path}, line {number}: score should be a finite number, got {value!r:.60}.")
    return score


def _label(path: Path, number: int, value: Any) -> int | str:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, bool) or not isinstance(value, int):
        raise StatisticsError(
            f"{path}, line {number}: label should be the number of a class or its name, got {value!r:.60}."
        )
    return value
