"""Measurements by machine: kept in memory by the process, and in a JSON file if one is given."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from secateur._errors import FormatError
from secateur.files import check_file, locked, write_text

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
        FormatError: the file is not an autotune cache, its contents are invalid, or it cannot be written.
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
        self._own: dict[str, Value] = {}
        if self._path is not None:
            check_file(self._path)
            own = _read_file(self._path).get(self._machine, {})
            self._own = {key: _read_entry(self._path, key, entry, read) for key, entry in own.items()}
        self._new: set[str] = set()

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
            self._new.add(key)

    def save(self) -> None:
        """Add the new measurements to the file, if there is one. It is written whole or not at all.

        The file is read again, and other processes that save wait, so that nobody's measurements are lost.

        Raises:
            FormatError: it cannot be written, or is not an autotune cache any more.
        """
        if self._path is None or not self._new:
            return
        new = {key: self._write(self._own[key]) for key in self._new}
        try:
            place = self._path.resolve()
            with locked(place):
                machines = _read_file(place)
                machines[self._machine] = {**machines.get(self._machine, {}), **new}
                write_text(place, json.dumps({"secateur autotune": _VERSION, "machines": machines}, indent=1) + "\n")
        except OSError as error:
            raise FormatError(f"{self._path} could not be written: {error.strerror}. Check its permissions.") from None


def _read_file(path: Path) -> dict[str, Any]:
    """The measurements in a file by machine; none if there is no file."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        version, machines = table["secateur autotune"], table["machines"]
        if version != _VERSION:
            return {}  # of another version: everything is measured again, and the file is replaced
        if not isinstance(machines, dict) or not all(isinstance(entry, dict) for entry in machines.values()):
            raise TypeError("machines should be a table of tables")
    except FileNotFoundError:
        return {}
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
