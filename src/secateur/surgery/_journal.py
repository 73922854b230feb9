"""Changes of a model that can be taken back and made again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_ABSENT: Any = object()


@dataclass(frozen=True)
class Change:
    """One entry of a dictionary that got another value.

    Args:
        table: the dictionary, such as the attributes or the parameters of a module.
        key: of the entry.
        old: value before.
        new: value after.
    """

    table: dict[str, Any]
    key: str
    old: Any
    new: Any


@dataclass
class Journal:
    """What was changed, in order. The old values stay in memory until the journal is forgotten."""

    changes: list[Change] = field(default_factory=list)

    def set(self, table: dict[str, Any], key: str, value: Any) -> None:
        """Give an entry of a dictionary another value."""
        self.changes.append(Change(table, key, table.get(key, _ABSENT), value))
        table[key] = value

    def undo(self, down_to: int = 0) -> None:
        """Take back all changes but the first few, and forget them."""
        self._revert(down_to)
        del self.changes[down_to:]

    @contextmanager
    def undone(self, down_to: int = 0) -> Iterator[None]:
        """Take back all changes but the first few for a while."""
        self._revert(down_to)
        try:
            yield
        finally:
            for change in self.changes[down_to:]:
                change.table[change.key] = change.new

    def _revert(self, down_to: int) -> None:
        for change in reversed(self.changes[down_to:]):
            if change.old is _ABSENT:
                change.table.pop(change.key, None)
            else:
                change.table[change.key] = change.old
