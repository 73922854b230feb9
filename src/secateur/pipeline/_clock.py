"""The working time of a stage: that of all runs that worked on it, without the pauses between them."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from secateur._types import Progress
from secateur.files import write_text

_FILE = "seconds.json"
_EVERY = 5.0  # seconds between two notes of the time, of which at most one is lost when the process is killed


class WorkingTime:
    """Counts seconds, and keeps them in a folder.

    Args:
        folder: where an earlier run may have left its seconds.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FILE
        try:
            self._before = float(json.loads(self._path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            self._before = 0.0
        self._began = self._noted = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds of all runs so far."""
        return self._before + time.monotonic() - self._began

    @contextmanager
    def counting(self, progress: Progress) -> Iterator[Progress]:
        """Yield a progress function that also notes the time now and then. At the end it is noted, too."""

        def noting(description: str, done: float, total: float) -> None:
            if time.monotonic() - self._noted > _EVERY:
                self._note()
            progress(description, done, total)

        try:
            yield noting
        finally:
            self._note()

    def _note(self) -> None:
        self._noted = time.monotonic()
        write_text(self._path, json.dumps(self.seconds))
