"""Folders for what is not complete yet: locked while their process lives, and swept by the next one when it died."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from secateur.files._rename import rename_new

if sys.platform != "win32":
    import fcntl

NEW = "new"  # in such a folder: what is being made,
OLD = "old"  # what it replaces, where the system cannot exchange two names at once,
_LOCK = "lock"  # and a file whose lock the system gives back when the process ends, however it ends
_SUFFIX = ".partial"
WORK = "work.json"  # marks a folder of work in progress


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``, and so on the same disk. It is deleted afterwards.

    Folders above it are made. If the block fails, those that are still empty are removed again.

    Raises:
        OSError: no folder can be made there.
    """
    made: list[Path] = []
    locks: list[int] = []
    folder = temporary_name(path)
    try:
        try:
            _make_folders(path.parent, made)
            sweep(path)
            while not _make_locked(folder, locks, path):
                folder = temporary_name(path)
            yield folder
        finally:
            try:
                _end(folder, locks, path)
            except KeyboardInterrupt:  # who stops us in here waits until it is done
                _end(folder, locks, path)
                raise
    except BaseException:
        for empty in reversed(made):
            with suppress(OSError):
                empty.rmdir()
        raise


@contextmanager
def scratch_folder(beside: Path | None) -> Iterator[Path]:
    """Yield an empty folder, which is deleted afterwards, with all that is in it.

    Args:
        beside: a folder to put it in. If the process is killed, the next one that asks for one there deletes it. None
            for the system's folder of temporary files.
    """
    if beside is None:
        with tempfile.TemporaryDirectory(prefix="secateur-") as made:
            yield Path(made)
    else:
        with temporary(beside / "scratch") as folder:
            (folder / NEW).mkdir()
            yield folder / NEW


def sweep(path: Path) -> None:
    """Delete the temporary folders beside ``path`` whose processes died.

    If one of them died between the two renames that replace a directory, the old directory is put back first. Where
    files cannot be locked, nothing is deleted.
    """
    if sys.platform == "win32":
        return
    with suppress(OSError):  # a folder that may not be listed; what is in there does no harm
        with os.scandir(path.parent) as entries:
            found = [Path(entry) for entry in entries if _is_temporary(entry, path)]
        for folder in found:
            _sweep(folder, path)


def sweep_folder(folder: Path) -> None:
    """Delete all temporary folders in a folder whose processes died, whatever they were for."""
    with suppress(OSError):
        starts = {name[1 : -len(_SUFFIX) - 9] for name in os.listdir(folder) if name.endswith(_SUFFIX)}
        for start in starts:
            if start:
                sweep(folder / start)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time pass, among those that lock the same path. Nothing is left behind.

    Where files cannot be locked, all pass.

    Raises:
        OSError: the folder cannot be written.
    """
    if sys.platform == "win32":
        yield
        return
    name = path.with_name(f".{path.name[:30]}.{_LOCK}")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        lock = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            if is_still(name, lock):  # else the one before us has removed it
                try:
                    yield
                finally:
                    name.unlink(missing_ok=True)
                return
        finally:
            os.close(lock)


def _make_folders(folder: Path, made: list[Path]) -> None:
    """Make a folder and those above it, and add those that were missing to a list, the deepest last."""
    for missing in (above for above in (*reversed(folder.parents), folder) if not above.is_dir()):
        with suppress(FileExistsError):  # another process was faster, or it is a file, which the next step says
            missing.mkdir()
            made.append(missing)


def temporary_name(path: Path) -> Path:
    """Return a new name in the same folder, which :func:`sweep` knows."""
    return path.parent / f"{_start(path)}{secrets.token_hex(4)}{_SUFFIX}"


def is_in_temporary(path: Path) -> bool:
    """Return whether a path lies in a directory that is not complete yet, or in a folder of work in progress."""
    partial = any(above.name == NEW and above.parent.name.endswith(_SUFFIX) for above in path.parents)
    places = (path, *path.parents)
    return partial or any(place.name.endswith(".work") and (place / WORK).is_file() for place in places)


def _start(path: Path) -> str:
    return f".{path.name[:30]}."  # of letters of 4 bytes: still short enough for every file system


def _is_temporary(entry: os.DirEntry[str], path: Path) -> bool:
    start = _start(path)
    middle = entry.name[len(start) : -len(_SUFFIX)]
    named = entry.name.startswith(start) and entry.name.endswith(_SUFFIX) and len(middle) == 8
    return named and entry.is_dir(follow_symlinks=False)


def _make_locked(folder: Path, locks: list[int], path: Path) -> bool:
    """Make a folder with a locked file, and add its descriptor to a list. Return False if somebody swept it before."""
    folder.mkdir(0o700)
    try:
        locks.append(os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileNotFoundError:
        return False
    if sys.platform != "win32" and not (take(locks[-1]) and is_still(folder / _LOCK, locks[-1])):
        os.close(locks.pop())
        return False
    os.write(locks[-1], os.fsencode(path.name))
    return True


def take(lock: int) -> bool:
    """Whether we hold the lock now. A file system without locks gives it to everybody, and sweeps nothing."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sweep(folder: Path, path: Path) -> None:
    if sys.platform == "win32":
        return
    try:
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        with suppress(OSError):  # it is not empty, and so not one that a process left while it made or deleted it
            folder.rmdir()
        return
    except OSError:
        return
    locks = [lock]
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails while its process lives
        mine = os.read(lock, 1024) == os.fsencode(path.name)
        if mine or not os.path.lexists(folder / OLD):  # else it is of another path, whose name begins alike
            _end(folder, locks, path)
    except OSError:
        pass
    finally:
        _close(locks)


def _end(folder: Path, locks: list[int], path: Path) -> None:
    """Put the old directory back if the new one has not taken its place, delete the rest, and give the lock back.

    The file of the lock is deleted last: whoever is stopped in here leaves what the next one sweeps. So does what
    cannot be put back or deleted.
    """
    try:
        if os.path.lexists(folder / OLD):
            with suppress(FileExistsError):
                rename_new(folder / OLD, path)
        # safetensors writes to a file of its own beside the one that it is given, and renames it.
        for left in (folder / NEW, folder / OLD, *folder.glob(".tmp*")):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)
    except OSError:
        return
    finally:
        _close(locks)  # before its file is deleted, because network disks keep files that are open
    with suppress(OSError):
        (folder / _LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _close(locks: list[int]) -> None:
    while locks:
        os.close(locks.pop())
