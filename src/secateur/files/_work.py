"""The folder of work in progress beside an output: ``OUT.work``, in which a command that was stopped goes on.

One process at a time has it. Each step of the work has a folder of its own, named by its number, its name and a hash of
the facts that decide its result, so that work is found again only while all of them are the same. Nothing in it is
deleted but what a dead process left half made: older results stay until the user removes them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from secateur._checks import instance
from secateur._errors import FormatError, RecipeError
from secateur.files._place import real_path
from secateur.files._reading import is_there, read_json, reading
from secateur.files._source import files_of
from secateur.files._temporary import WORK, is_still, sweep_folder, take
from secateur.files._whole import whole_directory, write_text

_MANIFEST = WORK  # of the whole folder
_STEP = "step.json"  # in the folder of a step: its name and facts
_RECORD = "record.json"  # beside it, once the step is done
_LOCK = "lock"
_FORMAT = 1
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")
_REMOVE = "Remove it, or give another --output (output=...)."


def work_path(output: str | Path) -> Path:
    """Return where the work for an output lies: beside the place to which the path leads, with ``.work`` at its end."""
    place = real_path(Path(output))
    return place.with_name(f"{place.name}.work")


@contextmanager
def work_folder(output: str | Path, *, restart: bool = False) -> Iterator[Work]:
    """Yield the folder of work for an output, made if need be, while no other process has it.

    The system gives it back when the process ends, however it ends. What a dead process left half made is deleted. A
    folder in which no step was begun is removed again.

    Args:
        output: directory that the work leads to; it need not exist.
        restart: ignore what earlier runs did. It stays on the disk.

    Raises:
        FormatError: another process has it; it is a link, or something else than such a folder; it cannot be written.

    Example:
        >>> import tempfile
        >>> from secateur.files import work_folder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for _ in range(2):
        ...         with work_folder(f"{folder}/small") as work:
        ...             step = work.step("shrink", {"model": "1f0c", "settings": "keep = 0.5"})
        ...             if not step.done:
        ...                 step.finish({"parameters": 12})
        ...     step.done, dict(step.record)
        (True, {'parameters': 12})
    """
    path = work_path(output)
    lock = _opened(path)
    try:
        generation = _generation(path / _MANIFEST)
        if restart and _steps(path):
            generation += 1
            write_text(path / _MANIFEST, json.dumps({"format": _FORMAT, "generation": generation}))
        _sweep(path)
        try:
            yield Work(path, generation)
        finally:
            if not _folders(path):
                with suppress(OSError):
                    for name in (_MANIFEST, _LOCK):
                        (path / name).unlink(missing_ok=True)
                    path.rmdir()
    finally:
        os.close(lock)


@dataclass(frozen=True)
class Work:
    """The folder of work for one output, which this process has.

    Args:
        path: of the folder.
        generation: 1, and one more with each restart.
    """

    path: Path
    generation: int = 1
    _numbers: Iterator[int] = field(default_factory=lambda: count(1), repr=False, compare=False)

    def step(self, name: str, facts: Mapping[str, str], number: int | None = None) -> WorkStep:
        """Return the folder of the next step: that of an earlier run if it had the same name and facts, else a new one.

        The same step at another number is found again.

        Args:
            name: lower-case letters, digits and dashes.
            facts: all that decides the result, as text by name, such as hashes of files, settings and versions.
            number: of the step; None numbers them in the order in which they are asked for.

        Raises:
            FormatError: the folder has something that no step left there, or cannot be written.
        """
        if not _NAME.fullmatch(instance("name", name, str)):
            raise RecipeError(f"the name of a step has up to 40 lower-case letters, digits and dashes, got {name!r}.")
        number = next(self._numbers) if number is None else number
        facts = {key: instance(key, facts[key], str) for key in sorted(facts)}
        earlier = _steps(self.path)
        own = [step for step in earlier if step.name == name and step.generation == self.generation]
        for step in reversed(own):
            if step.facts == facts:
                return WorkStep(step.path, number, name, facts, is_there(step.path / _RECORD), ())
        before = [step.facts for step in own if step.number == number]
        changed = _different(before[-1], facts) if before else ()
        short = hashlib.sha256(json.dumps([name, self.generation, facts]).encode()).hexdigest()[:12]
        path = self.path / f"{number:02d}-{name}-{short}"
        order = max((step.order for step in earlier), default=0) + 1
        manifest = {"format": _FORMAT, "name": name, "number": number, "generation": self.generation, "order": order}
        with whole_directory(path) as made:
            (made / _STEP).write_text(json.dumps({**manifest, "facts": facts}, indent=1) + "\n", encoding="utf-8")
        return WorkStep(path, number, name, facts, False, changed)


@dataclass(frozen=True)
class WorkStep:
    """The folder of one step.

    Args:
        path: of the folder. What is written there stays; names other than ``step.json`` and ``record.json`` are free.
        number: of the step in this run, from 1.
        name: of the step.
        facts: that decide its result.
        done: an earlier run has finished it.
        changed: names of the facts that differ from those of the latest earlier run of a step with this number and
            name; empty if there was none, or if the step of an earlier run goes on.
    """

    path: Path
    number: int
    name: str
    facts: Mapping[str, str]
    done: bool
    changed: tuple[str, ...]

    @cached_property
    def record(self) -> Mapping[str, Any]:
        """What :meth:`finish` was given.

        Raises:
            FormatError: the step is not finished.
        """
        return _json(self.path / _RECORD)

    def finish(self, record: Mapping[str, Any] | None = None) -> None:
        """Note that the step is done. When this returns, it is on the disk.

        Args:
            record: JSON-ready values that later runs read.

        Raises:
            FormatError: it cannot be written.
        """
        write_text(self.path / _RECORD, json.dumps(dict(record or {})) + "\n")
        vars(self).pop("record", None)


def hash_files(path: str | Path) -> str:
    """Return a SHA-256 over the names and contents of all files of a model directory, or over one file.

    Raises:
        FormatError: a file cannot be read, or there is none.
    """
    path = Path(path)
    if not is_there(path):
        raise FormatError(f"{path} does not exist. Give a model directory or a text file.")
    whole = hashlib.sha256()
    for found in files_of(path) if path.is_dir() else (path,):
        with reading(found):
            if not stat.S_ISREG(found.stat().st_mode):
                raise FormatError(f"{found} is no regular file, and is not read. Remove it from the model directory.")
            with found.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        name = found.relative_to(path).as_posix() if found != path else ""
        whole.update(json.dumps([name, content]).encode())
    return whole.hexdigest()


@dataclass(frozen=True)
class _Found:
    """What the folder of a step says of itself."""

    path: Path
    name: str
    number: int
    generation: int
    order: int
    facts: Mapping[str, str]


def _opened(path: Path) -> int:
    """The descriptor of the locked file in a folder of work, which is made if need be."""
    while True:
        with _naming(path):
            if not os.path.lexists(path):
                _make(path)
            try:
                _check(path)
                lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
            except FileNotFoundError:  # whoever had it has just removed it
                continue
            if not take(lock):
                owner = os.read(lock, 20).decode("ascii", "replace")
                os.close(lock)
                raise FormatError(
                    f"{path} is in use by another process{f' ({owner})' if owner.isdecimal() else ''}, which makes the "
                    "same output.\nWait until it ends, or give another --output (output=...)."
                )
            if is_still(path / _LOCK, lock):
                os.ftruncate(lock, 0)
                os.write(lock, str(os.getpid()).encode())
                return lock
            os.close(lock)


def _make(path: Path) -> None:
    try:
        with whole_directory(path) as made:
            (made / _MANIFEST).write_text(json.dumps({"format": _FORMAT, "generation": 1}), encoding="utf-8")
    except FormatError:
        if not os.path.lexists(path):  # else another process was faster
            raise


def _check(path: Path) -> None:
    """Raise unless a path is a folder of work, and our own."""
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        raise FormatError(f"{path} is a link, and work in progress is not written through links. {_REMOVE}")
    if not stat.S_ISDIR(found.st_mode):
        raise FormatError(f"{path} is in the place of the folder for work in progress. {_REMOVE}")
    if sys.platform != "win32" and found.st_uid != os.geteuid() and os.geteuid() != 0:
        raise FormatError(f"{path} belongs to another user, so what it holds is not used. {_REMOVE}")
    if not (path / _MANIFEST).is_file() and any(entry.name != _LOCK for entry in path.iterdir()):
        raise FormatError(f"{path} is no folder of work in progress: it has no {_MANIFEST}. {_REMOVE}")


def _generation(path: Path) -> int:
    if not os.path.lexists(path):  # an empty folder, which somebody made
        write_text(path, json.dumps({"format": _FORMAT, "generation": 1}))
    table = _json(path)
    generation = table.get("generation")
    if table.get("format") != _FORMAT or type(generation) is not int or generation < 1:
        raise FormatError(
            f"{path} is of format {table.get('format')!r:.20}; this version of secateur reads format {_FORMAT}. "
            "Remove the folder to begin anew."
        )
    return generation


def _json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of the folder, which is no link."""
    with reading(path):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise FormatError(f"{path} is no regular file, and is not read. Remove it.")
    return read_json(path)


def _folders(path: Path) -> list[Path]:
    """All that lies in the folder beside its own files, temporary folders among it."""
    with suppress(OSError):
        return sorted(entry for entry in path.iterdir() if entry.name not in (_MANIFEST, _LOCK))
    return []


def _steps(path: Path) -> list[_Found]:
    """All steps that earlier runs began, in the order in which they did."""
    found = []
    for folder in _folders(path):
        if folder.is_symlink():
            raise FormatError(f"{folder} is a link, which no run makes there. Remove it.")
        if folder.name.startswith(".") or not os.path.lexists(folder / _STEP):
            continue  # a temporary folder, or something of the user
        table = _json(folder / _STEP)
        try:
            facts = table["facts"]
            step = _Found(folder, table["name"], table["number"], table["generation"], table["order"], facts)
            right = isinstance(step.name, str) and isinstance(facts, dict)
            right = right and all(type(value) is int for value in (step.number, step.generation, step.order))
        except KeyError:
            right = False
        if not right or table.get("format") != _FORMAT:
            raise FormatError(f"{folder / _STEP} is not what a run writes there. Remove {folder} to do the step again.")
        found.append(step)
    return sorted(found, key=lambda step: step.order)


def _sweep(path: Path) -> None:
    """Delete what dead processes left half made, in the folder and in those of its steps."""
    for folder in (path, *(entry for entry in _folders(path) if entry.is_dir() and not entry.is_symlink())):
        sweep_folder(folder)


def _different(before: Mapping[str, str], after: Mapping[str, str]) -> tuple[str, ...]:
    names = dict.fromkeys([*after, *before])
    return tuple(name for name in names if before.get(name) != after.get(name))


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the folder in errors of the system."""
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise FormatError(f"{path / _LOCK} is a link, which no run makes there. {_REMOVE}") from None
        raise FormatError(f"{path} cannot be used for work in progress: {error.strerror}.") from None
