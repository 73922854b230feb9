"""Renames that never replace by accident, and exchanges of two names with no moment in between."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

_HERE = -100  # AT_FDCWD: paths are relative to the working directory
# Linux's renameat2 and macOS' renamex_np number the same two wishes differently.
_NO_REPLACE = {"linux": 1, "darwin": 4}
_EXCHANGE = {"linux": 2, "darwin": 2}
# What a system or a file system answers that lacks these calls. Some containers answer EPERM to calls that they do not
# know; where it is a real refusal, the plain rename is refused, too.
_LACKING = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM}


def rename_new(path: Path, target: Path) -> None:
    """Rename, but only to a name that nothing has.

    Where the system lacks such a rename, a plain one is made after a look. POSIX then still refuses a file, and a
    directory that holds anything, so that nothing can be lost.

    Args:
        path: a directory.
        target: its new name, on the same disk.

    Raises:
        FileExistsError: something has the new name.
        OSError: it cannot be renamed.
    """
    if not _ask(path, target, _NO_REPLACE):
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        try:
            os.rename(path, target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR, errno.EEXIST):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            raise


def exchange(path: Path, other: Path) -> bool:
    """Exchange two names on one disk at once: each always names something. Return False if the system cannot do that.

    Raises:
        OSError: one of them does not exist, or may not be renamed.
    """
    return _ask(path, other, _EXCHANGE)


def _ask(path: Path, target: Path, flags: dict[str, int]) -> bool:
    """Rename with a flag of the system. Return False if it lacks the call."""
    call = _system_call()
    if call is None:
        return False
    if call(os.fsencode(path), os.fsencode(target), flags[sys.platform]) == 0:
        return True
    number = ctypes.get_errno()
    if number in _LACKING:
        return False
    raise OSError(number, os.strerror(number), str(path), None, str(target))


@cache
def _system_call() -> Any:
    """The system's rename with flags, called with two paths and the flag; or None."""
    if sys.platform not in _EXCHANGE:
        return None
    library = ctypes.CDLL(None, use_errno=True)
    if sys.platform == "darwin":
        found = getattr(library, "renamex_np", None)
        return found and _typed(found, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
    found = getattr(library, "renameat2", None)
    if found is None:  # an old C library
        return None
    call = _typed(found, ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return lambda path, target, flag: call(_HERE, path, _HERE, target, flag)


def _typed(function: Any, *arguments: Any) -> Any:
    function.argtypes, function.restype = arguments, ctypes.c_int
    return function
