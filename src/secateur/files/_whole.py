"""Files and directories that appear complete or not at all. All code that writes to a user's disk goes through here.

What is made lies in a temporary folder beside its place until it is on the disk, and takes its place by one rename. A
new directory takes a name that nothing has. Where a directory is replaced, the two exchange their names at once, so
that the name always has a whole directory. On systems that cannot do that (Linux before 3.15, some network disks,
Windows), the old one steps aside for the moment between two renames; if the process is killed just there, the next one
that looks at the place puts it back.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from secateur._errors import FormatError, SparsityError
from secateur.files._place import already_exists, check_replaceable, real_path
from secateur.files._rename import exchange, rename_new
from secateur.files._safetensors import check_header_length
from secateur.files._temporary import NEW, OLD, WORK, is_in_temporary, temporary

_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
_written: ContextVar[list[tuple[Path, Path, os.stat_result]] | None] = ContextVar("_written", default=None)


@contextmanager
def note_written() -> Iterator[Callable[[], list[Path]]]:
    """Yield a function that returns which files and directories were written since the block began.

    It asks the disk, so that it is right at any moment, even if an interrupt comes in the middle of a rename.
    """
    noted: list[tuple[Path, Path, os.stat_result]] = []
    token = _written.set(noted)
    try:
        yield lambda: list(dict.fromkeys(asked for asked, place, made in noted if _is_at(place, made)))
    finally:
        _written.reset(token)


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield an empty file beside ``path`` to fill. It replaces ``path`` if the block ends well; else it is deleted.

    An old file stays in place until the new one is complete and on the disk, and its mode is kept. Missing folders are
    made. If ``path`` is a link, the file that it points to is replaced.

    Raises:
        FormatError: the disk is full, or the place cannot be written.
    """
    with _place_for(path) as (place, new):
        new.touch(exist_ok=False)
        mode = (place if place.exists() else new).stat().st_mode & 0o777
        yield new
        _flush(new)
        new.chmod(mode)  # save_file makes its file private
        _note(Path(path), place, new)
        os.replace(new, place)


@contextmanager
def whole_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty directory beside ``path``. It takes this place if the block ends well; else it is deleted.

    Missing folders are made. If ``path`` is a link, the place is that to which it points.

    Args:
        path: of the directory.
        overwrite: replace a model directory, or an empty one. It stays in place until the new one is complete and on
            the disk, and its mode is kept. Otherwise a directory that appears there in the meantime is kept, and what
            was made is deleted.

    Raises:
        FormatError: the disk is full, the place cannot be written, or it has something that may not be replaced.
    """
    with _place_for(path) as (place, new):
        if not overwrite and os.path.lexists(place):
            raise FormatError(already_exists(path))
        new.mkdir()
        yield new
        for entry in new.rglob("*"):
            if entry.is_dir():
                _flush_folder(entry)
            elif entry.is_file():
                _flush(entry)
        _flush_folder(new)
        _note(Path(path), place, new)
        try:
            _put(new, place, overwrite)
        except FileExistsError:
            raise FormatError(
                f"{path} was made by something else while this run was writing. It is kept, and what this run made is "
                "deleted.\nGive another directory, or --overwrite (overwrite=True) to replace it."
            ) from None


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8: complete, or not at all.

    Raises:
        FormatError: it cannot be written.
    """
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_safetensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file: complete, or not at all.

    Args:
        path: of the file.
        tensors: contiguous tensors by name; no two share memory.
        metadata: texts by name, for the header.

    Raises:
        FormatError: it cannot be written.
    """
    with whole_file(path) as partial:
        save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
        check_header_length(partial)


@contextmanager
def _place_for(path: str | Path) -> Iterator[tuple[Path, Path]]:
    """Yield the place to which a path leads, and a new name beside it. Errors speak of the place, as users know it."""
    path = Path(path)
    new: Path | None = None
    try:
        place = real_path(path)
        with temporary(place) as folder:
            new = folder / NEW
            yield place, new
            _flush_folder(place.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(path, _in_place(_said(error), new, path), error) from None
    except SparsityError as error:
        if (said := _in_place(str(error), new, path)) == str(error):
            raise
        raise type(error)(said) from None


def _put(new: Path, place: Path, overwrite: bool) -> None:
    while not (overwrite and _replace(new, place)):
        try:
            rename_new(new, place)
            return
        except FileExistsError:
            if not overwrite:
                raise


def _replace(new: Path, place: Path) -> bool:
    """Put a directory in the place of an old one. Return False if there is none."""
    if not os.path.lexists(place):
        return False
    check_replaceable(place)
    new.chmod(place.stat().st_mode & 0o777)
    try:
        exchanged = exchange(new, place)
    except FileNotFoundError:
        return False  # it has just been removed
    if not exchanged:
        place.rename(new.with_name(OLD))
        rename_new(new, place)  # if it fails, the temporary folder puts the old one back
        return True
    try:
        check_replaceable(new)  # what was in the place in that very moment
    except FormatError:
        exchange(new, place)
        raise
    return True


def _note(path: Path, place: Path, new: Path) -> None:
    """Note what is about to be renamed. Whether it was, the disk says."""
    if (noted := _written.get()) is not None and not is_in_temporary(place) and not (new / WORK).is_file():
        noted.append((path, place, new.stat()))


def _is_at(place: Path, made: os.stat_result) -> bool:
    with suppress(OSError):
        return os.path.samestat(place.stat(), made)
    return False


def _not_written(path: Path, what: str, error: Exception) -> FormatError:
    full = getattr(error, "errno", None) in _FULL or "No space left" in what
    advice = "The disk is full: free some space and run again." if full else "Check the path and its permissions."
    with suppress(OSError):  # a name that is too long
        if path.exists():
            return FormatError(f"{path} could not be written: {what}.\n{advice} The old {path.name} is as it was.")
    return FormatError(f"{path} could not be written: {what}.\n{advice} Nothing was left behind.")


def _said(error: Exception) -> str:
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.strerror}: {os.fsdecode(error.filename)}"


def _in_place(message: str, new: Path | None, path: Path) -> str:
    """A message about the place where the user expects the file, not about the temporary one."""
    if new is None:
        return message
    return message.replace(str(new), str(path)).replace(str(new.parent), str(path)).removesuffix(f": {path}")


def _flush(path: Path) -> None:
    """Wait until the contents are on the disk, so that a crash cannot leave a name without them."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    with suppress(OSError):  # not every system can flush a folder, and its files are on the disk already
        _flush(path)
