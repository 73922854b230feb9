"""Measurements kept by machine: in memory for the process, and in a JSON file if one is named."""

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
        path: of the file; it need not exist yet. None keeps them for this process only.
        machine: what measurements hold for.
        read: from what JSON holds of a measurement; raises any of ``TypeError``, ``ValueError``, ``KeyError``,
            ``AttributeError`` and ``OverflowError`` if it cannot be one.
        write: to what JSON can hold.

    Raises:
        FormatError: the file is not an autotune cache, or its contents are invalid.
    """

    _memory: ClassVar[dict[tuple[str, str], Any]] = {}  # shared on purpose, by all of the process

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
        """Return what is known under a key on this machine."""
        return self._own.get(key) or self._memory.get((self._machine, key))

    def put(self, key: str, measured: Value, *, lasting: bool = True) -> None:
        """Remember a measurement: in the file only if it is worth keeping, as from a quiet machine."""
        self._memory[self._machine, key] = measured
        if lasting:
            self._own[key] = measured

    def save(self) -> None:
        """Write the file, whole or not at all."""
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
            return {}  # of another version: measured anew, and replaced
        if not isinstance(machines, dict) or not all(isinstance(entry, dict) for entry in machines.values()):
            raise TypeError("machines should be a table of tables")
    except (OSError, ValueError, RecursionError, TypeError, KeyError) as error:
        raise FormatError(
            f"{path} is not a file of autotune measurements: {error!r:.200}.\nGive another path, or delete it."
        ) from None
    return dict(machines)


def _read_entry(path: Path, key: str, entry: Any, read: Callable[[Any], Value]) -> Value:
    try:
        return read(entry)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise FormatError(
            f"{path}: the measurement {key!r:.200} is invalid.\nDelete the file to measure anew."
        ) from None
