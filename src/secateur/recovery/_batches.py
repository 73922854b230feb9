"""The batches of a recovery: read once, and parted into those to learn from and those that are held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import nn

from secateur._errors import StatisticsError
from secateur.calibration import Forward, evenly, fit_arguments, hash_batches, load_batches
from secateur.recovery._processes import world
from secateur.recovery._runs import rows_of
from secateur.recovery._settings import Settings

_MOST_HELD_OUT = 64  # batches: more would cost time and change little


@dataclass(frozen=True)
class Batches:
    """What a model learns from.

    Args:
        all: batches as the model takes them, on the CPU.
        train: numbers of those to learn from.
        measure: numbers of those that are held out.
        ignored: what was left out of them, or empty.
    """

    all: Sequence[Any]
    train: tuple[int, ...]
    measure: tuple[int, ...]
    ignored: str

    @classmethod
    def of(cls, model: nn.Module, batches: Iterable[Any], settings: Settings, forward: Forward | None) -> Batches:
        """Read batches. Of an endless source, as many as the steps need are read.

        Raises:
            StatisticsError: fewer than two, or one that does not fit the model.
            TypeError: a single batch in place of several.
        """
        cpu = torch.device("cpu")
        limited: Iterable[Any] = batches
        if settings.steps is not None and not _is_sized(batches):
            needed = settings.steps * settings.accumulate * world()[1]
            limited = islice(batches, int(needed / (1 - settings.held_out)) + 2)
        loaded = load_batches(limited, cpu)
        fitted = None if forward is not None else fit_arguments(model, loaded, cpu)
        found = loaded if fitted is None else fitted.batches
        if len(found) < 2:
            raise StatisticsError(
                "there is one batch, but at least two are needed: one to learn from, and one that is held out.\nCut it "
                "into several, or give more text."
            )
        count = min(max(1, round(settings.held_out * len(found))), _MOST_HELD_OUT)
        measure = evenly(count, len(found))
        train = tuple(number for number in range(len(found)) if number not in set(measure))
        return cls(found, train, measure, "" if fitted is None else fitted.ignored)

    @property
    def digest(self) -> str:
        """SHA-256 over all batches."""
        return hash_batches(list(self.all))

    def rows(self, numbers: Sequence[int]) -> int:
        """Return how many rows some batches have."""
        return sum(rows_of(self.all[number]) for number in numbers)


def _is_sized(batches: object) -> bool:
    """Whether it says how many there are. A loader of an endless data set has a method for that, which fails."""
    try:
        len(batches)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True
