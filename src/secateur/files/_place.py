"""May something be written at a path? Asked before hours of work."""

from __future__ import annotations

import errno
import os
import shutil
from contextlib import suppress
from pathlib import Path

from secateur._errors import FormatError
from secateur.files._source import EXPORTED, check_source
from secateur.files._temporary import sweep, temporary_name

_ROOM = 100  # bytes of a path that the names of temporary folders and of files in them may add


def check_output(source: Path | None, output: Path, overwrite: bool, num_bytes: int) -> None:
    """Raise unless a model directory may be written.

    What an earlier run left beside it when it was killed is deleted first.

    Args:
        source: directory that is read, or None.
        output: directory to write.
        overwrite: an existing output may be replaced.
        num_bytes: that the weights of the output need.

    Raises:
        FormatError: the output exists and ``overwrite`` is off, is the source, is no directory, or does not fit on the
            disk; or the source has files that cannot be copied.
    """
    existing = _check_place(output)
    place = real_path(output)
    if source is not None:
        num_bytes += check_source(source, num_bytes)
        _check_apart(source, output)
    if os.path.lexists(place):
        if place.is_dir() and not overwrite:
            raise FormatError(already_exists(output))
        check_replaceable(output)
        if not os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            raise FormatError(f"{output} cannot be replaced: it is a directory that you may not write to.")
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise FormatError(f"{output} needs {num_bytes:,} bytes, but the disk has {free:,} left. Free some space first.")


def check_file(path: Path, output: Path | None = None, *, inside: bool = True) -> Path:
    """Return the nearest existing directory above a file that may be written, or replaced.

    What an earlier run left beside it when it was killed is deleted first.

    Args:
        path: of the file.
        output: directory that the same run makes; the file may not be in its way.
        inside: the file is written after the output, and may lie in it.

    Raises:
        FormatError: the path is a directory, or nothing can be made there.
    """
    existing = _check_place(path)
    place = real_path(path)
    if place.is_dir():
        raise FormatError(f"{path} is a directory. Give the path of a file.")
    if os.path.lexists(place) and not place.is_file():
        raise FormatError(f"{path} is no regular file, and cannot be replaced. Give the path of a file.")
    if output is not None:
        whole = real_path(output)
        if whole.is_relative_to(place) or (not inside and place.is_relative_to(whole)):
            raise FormatError(f"{path} is where the output {output} is made. Give the path of another file.")
    return existing


def _check_place(path: Path) -> Path:
    """Return the nearest existing directory above a path to write, after deleting what killed runs left beside it.

    Raises:
        FormatError: nothing can be made there.
    """
    try:
        place = real_path(path)
        existing = next((folder for folder in place.parents if _exists(folder)), place)
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{existing} is not a directory that you may write to")
        _check_names(place, existing)
        _try(existing, place)
        sweep(place)
    except OSError as error:
        raise FormatError(f"{path} cannot be made: {error.strerror}.") from None
    return existing


def check_replaceable(output: Path) -> None:
    """Raise if there is something that ``--overwrite`` may not replace.

    Raises:
        FormatError: it is a file, or a directory that holds something other than a model.
    """
    if not output.is_dir():
        raise FormatError(f"{output} is a file. Give another output directory.")
    try:
        known = any((output / name).is_file() for name in ("config.json", EXPORTED))
        is_model = known or not any(output.iterdir())
    except OSError as error:
        raise FormatError(f"{output} cannot be replaced: {error.strerror}. Check its permissions.") from None
    if not is_model:
        raise FormatError(
            f"{output} holds something other than a model, which --overwrite (overwrite=True) would delete. "
            "Give another output directory."
        )


def already_exists(output: str | Path) -> str:
    """Return the message about an output that exists."""
    return f"{output} already exists. Give another directory, or --overwrite (overwrite=True) to replace it."


def real_path(path: Path) -> Path:
    """Return the absolute path to which links lead.

    Raises:
        OSError: the links lead to themselves, or a name is too long.
    """
    with suppress(FileNotFoundError, NotADirectoryError):
        path.stat()
    return Path(os.path.realpath(path))


def _check_apart(source: Path, output: Path) -> None:
    read, written = source.resolve(), output.resolve()
    if written != read and written.is_relative_to(read):
        raise FormatError(f"{output} is inside the model that is read. Give an output directory outside of it.")
    if output.is_dir() and read.is_relative_to(written):
        raise FormatError(f"{output} holds the model that is read. Give another output directory.")


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def _check_names(place: Path, existing: Path) -> None:
    """Names of folders that are still to be made are checked by the system only when they are made."""
    try:
        name, whole = (os.pathconf(existing, key) for key in ("PC_NAME_MAX", "PC_PATH_MAX"))
    except (AttributeError, OSError, ValueError):
        return  # a system that does not tell
    new = place.relative_to(existing).parts
    if max((len(os.fsencode(part)) for part in new), default=0) > name or len(os.fsencode(place)) + _ROOM > whole:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _try(folder: Path, place: Path) -> None:
    """Make something there, and remove it: permissions are not the only reason why it may fail."""
    made = folder / temporary_name(place).name
    try:
        try:
            made.mkdir(0o700)
        finally:
            with suppress(FileNotFoundError):
                made.rmdir()
    except OSError as error:
        reason = f"{folder} is not a directory that you may write to ({error.strerror})"
        raise OSError(error.errno, reason) from None
