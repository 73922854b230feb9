"""Files and directories that appear complete or not at all. All code that writes to a user's disk goes through here."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from secateur._errors import FormatError
from secateur.files._safetensors import check_header_length


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Yield an empty file beside ``path`` to fill. It replaces ``path`` if the block ends well; else it is deleted.

    An old file stays in place until the new one is complete and on the disk, and its mode is kept. Missing folders are
    made. If ``path`` is a link, the file that it points to is replaced.

    Raises:
        FormatError: the disk is full, or the place cannot be written.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(path)
        beside.touch(exist_ok=False)
        partial = beside
        mode = (path if path.exists() else partial).stat().st_mode & 0o777
        yield partial
        _flush(partial)
        partial.chmod(mode)  # save_file makes its file private
        os.replace(partial, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """Yield an empty directory beside ``path``. It replaces ``path`` if the block ends well; else it is deleted.

    An old directory stays in place until the new one is complete and on the disk, and its mode is kept. Missing folders
    are made. If ``path`` is a link, the directory that it points to is replaced.

    Raises:
        FormatError: the disk is full, or the place cannot be written.
    """
    path = Path(path)
    partial: Path | None = None
    try:
        path = path.resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = _beside(path)
        beside.mkdir()
        partial = beside
        yield partial
        for entry in partial.rglob("*"):
            if entry.is_dir():
                _flush_folder(entry)
            elif entry.is_file():
                _flush(entry)
        _flush_folder(partial)
        if path.exists():
            partial.chmod(path.stat().st_mode & 0o777)
        _swap(partial, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise _not_written(path, error, partial) from None
    except FormatError as error:
        if partial is None or str(partial) not in str(error):
            raise
        raise FormatError(_renamed(str(error), partial, path)) from None  # of whole_file, for a file in here
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


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


def _beside(path: Path) -> Path:
    """A new name in the same folder, and so on the same disk: the last step is then one rename."""
    return path.with_name(f".{path.name[:50]}.{secrets.token_hex(4)}.partial")  # systems allow 255 bytes


def _not_written(path: Path, error: Exception, partial: Path | None = None) -> FormatError:
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    advice = "The disk is full: free some space and run again." if full else "Check the path and its permissions."
    rest = f"The old {path.name} is as it was." if _exists(path) else "Nothing was left behind."
    return FormatError(f"{path} could not be written: {_renamed(str(error), partial, path)}.\n{advice} {rest}")


def _exists(path: Path) -> bool:
    with suppress(OSError):  # a name that is too long
        return path.exists()
    return False


def _renamed(message: str, partial: Path | None, path: Path) -> str:
    """A message about the place where the user expects the file, not about the temporary one."""
    return message if partial is None else message.replace(str(partial), str(path))


def _swap(partial: Path, path: Path) -> None:
    if not path.exists():
        partial.rename(path)
        return
    # A directory cannot be renamed over another: step the old one aside, and back if the new one cannot take its place.
    old = partial.with_suffix(".old")
    try:
        path.rename(old)
        partial.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
