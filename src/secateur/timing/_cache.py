"""Measurements by machine: kept in memory by the process, and in a JSON file if one is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from secateur._errors import FormatError
from secateur.files import write_text

_VERSION = 1

Value = TypeVar("Value")


class MeasurementCache(Generic[Value]):
    """Measurements by machine and key.

    Args:
        path: of the file, which need not exist yet. None keeps measurements only while the process runs.
        machine: the machine that is measured, from :func:`~secateur.timing.describe_machine`.
        read: returns the measurement for a JSON value. It raises ``TypeError``, ``ValueError``, ``KeyError``,
            ``AttributeError`` or ``OverflowError`` if the value is not one.
        write: returns the JSON value for a measurement.

    Raises:
        FormatError: the file is not an autotune cache, or its contents are invalid.
    """

    _memory: ClassVar[dict[tuple[str, str], Any]] = {}  # of the class, so that all caches of a process share it

    def __init__(
        self,
        path: str | Path | None,
        machine: Mapping[str, str],
        read: Callable[[Any], Value],
        write: Callable[[Value], Any],
    ) -> None:
        self._path = None if path is None else Path(path)
        self._machine = json.dumps(dict(machine), sort_keys=True)
        self._write = write
        self._others: dict[str, Any] = {}
        self._own: dict[str, Value] = {}
        if self._path is not None and self._path.exists():
            self._others = _read_file(self._path)
            own = self._others.pop(self._machine, {})
            self._own = {key: _read_entry(self._path, key, entry, read) for key, entry in own.items()}

    def get(self, key: str) -> Value | None:
        """Return the measurement under a key on this machine, or None."""
        return self._own.get(key) or self._memory.get((self._machine, key))

    def put(self, key: str, measured: Value, *, lasting: bool = True) -> None:
        """Keep a measurement in memory, and if it is ``lasting`` also in the file.

        A measurement of a busy machine should not be lasting.
        """
        self._memory[self._machine, key] = measured
        if lasting:
            self._own[key] = measured

    def save(self) -> None:
        """Write the file, if there is one. It is written whole or not at all."""
        if self._path is None:
            return
        own = {key: self._write(measured) for key, measured in self._own.items()}
        table = {"secateur autotune": _VERSION, "machines": {**self._others, self._machine: own}}
        write_text(self._path, json.dumps(table, indent=1) + "\n")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version, machines = table["secateur autotune"], table["machines"]
        if version != _VERSION:
            return {}  # of another version: everything is measured again, and the file is replaced
        if not isinstance(machines, dict) or not all(isinstance(entry, dict) for entry in machines.values()):
            raise TypeError("machines should be a table of tables")
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise FormatError(
            f"{path} is not an autotune cache, or cannot be read: {error!r:.200}.\nGive another path, or delete it."
        ) from None
    return dict(machines)


def _read_entry(path: Path, key: str, entry: Any, read: Callable[[Any], Value]) -> Value:
    try:
        return read(entry)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise FormatError(
            f"{path}: the measurement {key!r:.200} is invalid.\nDelete the file to measure again."
        ) from None
