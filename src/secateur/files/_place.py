"""May something be written at a path? Asked before hours of work."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from secateur._errors import FormatError


def check_output(source: Path | None, output: Path, overwrite: bool, num_bytes: int) -> None:
    """Raise unless a model directory may be written.

    Args:
        source: directory that is read, or None.
        output: directory to write.
        overwrite: an existing output may be replaced.
        num_bytes: that the output needs.

    Raises:
        FormatError: the output exists and ``overwrite`` is off, is the source, is no directory, or does not fit on the
            disk.
    """
    existing = check_place(output)
    if source is not None:
        _check_source(source, output)
    if output.exists():
        if not output.is_dir():
            raise FormatError(f"{output} is a file. Give another output directory.")
        if not overwrite:
            raise FormatError(
                f"{output} already exists. Give another directory, or --overwrite (overwrite=True) to replace it."
            )
        if any(output.iterdir()) and not (output / "config.json").is_file():
            raise FormatError(
                f"{output} holds something other than a model, which --overwrite (overwrite=True) would delete. "
                "Give another output directory."
            )
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise FormatError(f"{output} needs {num_bytes:,} bytes, but the disk has {free:,} left. Free some space first.")


def _check_source(source: Path, output: Path) -> None:
    for entry in source.rglob("*"):
        if not entry.exists():
            raise FormatError(f"{entry} is a link to nothing. Complete the model directory first.")
        if entry.is_symlink() and entry.is_dir():
            raise FormatError(f"{entry} is a link to a directory. Copy the model without such links first.")
    read, written = source.resolve(), output.resolve()
    if written != read and written.is_relative_to(read):
        raise FormatError(f"{output} is inside the model that is read. Give an output directory outside of it.")
    if output.is_dir() and read.is_relative_to(written):
        raise FormatError(f"{output} holds the model that is read. Give another output directory.")


def check_place(path: Path) -> Path:
    """Return the nearest existing directory above a path to write.

    Raises:
        FormatError: nothing can be made there.
    """
    parent = path.absolute().parent
    try:
        path.exists()  # raises for a name that is too long
        existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    except OSError as error:
        raise FormatError(f"{path} cannot be made: {error.strerror}.") from None
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise FormatError(f"{path} cannot be made: {existing} is not a directory that you may write to.")
    return existing
