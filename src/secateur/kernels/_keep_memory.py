"""Memory that was freed and is wanted again at the next call: the system clears each page that it hands out anew."""

from __future__ import annotations

import ctypes

from secateur._checks import integer

# Numbers of settings in malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST = 2**31 - 1  # a C int
_OLD_LARGEST = 32 << 20  # for the second setting before glibc 2.35


def keep_memory(limit: int = 1 << 30) -> bool:
    """Let this process keep memory that it has freed, for the outputs of the next call.

    A layer with a large batch writes an output of some megabytes. glibc may give such memory back to the system when it
    is freed, and get new pages for the next output, which the system clears first. Whether it does depends on what else
    lies on the heap. Up to a quarter of the time of a packed encoder went into this. The setting holds for all code of
    the process, until it ends. No result changes.

    Args:
        limit: bytes of freed memory that the process may keep, and the largest block that is kept.

    Returns:
        Whether the C library took the setting. False without glibc, as on macOS, Windows and Alpine Linux.

    Raises:
        RecipeError: a limit below 0.
        TypeError: a limit that is not an int.

    Example:
        >>> from secateur import kernels
        >>> kernels.keep_memory(64 << 20) in (True, False)
        True
    """
    size = min(integer("limit", limit, 0), _LARGEST)
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    kept = mallopt(_TRIM_THRESHOLD, size)
    return bool(kept and (mallopt(_MMAP_THRESHOLD, size) or mallopt(_MMAP_THRESHOLD, min(size, _OLD_LARGEST))))
