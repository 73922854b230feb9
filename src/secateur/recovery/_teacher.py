"""What is kept of the teacher's outputs: computed once for each batch, in memory, and on disk beyond a budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.recovery._terms import Kept


class TeacherOutputs:
    """What a loss needs of the teacher, by the number of a batch.

    Args:
        compute: runs the teacher for a number, and returns what is kept, for this number and maybe for others.
        budget: bytes to hold in memory.
        keep: False computes all of it again each time.
        folder: for what is beyond the budget.
    """

    def __init__(
        self, compute: Callable[[int], dict[int, dict[str, Tensor]]], budget: int, keep: bool, folder: Path
    ) -> None:
        self._compute, self._budget, self._keep, self._folder = compute, budget, keep, folder
        self._held: dict[int, Kept] = {}
        self._files: dict[int, Path] = {}
        self._bytes = self._on_disk = 0
        self._full = ""

    def __getitem__(self, index: int) -> Kept:
        if index in self._held:
            return self._held[index]
        if index in self._files:
            return load_file(self._files[index])
        made = self._compute(index)
        if self._keep:
            for number, kept in made.items():
                self._put(number, kept)
        return made[index]

    @property
    def notes(self) -> tuple[str, ...]:
        """Where the outputs went, if that was not memory."""
        found = []
        if self._on_disk:
            found.append(f"{self._on_disk / 1e6:,.0f} MB of the teacher's outputs were kept on disk during the run")
        if self._full:
            found.append(
                f"the disk has no room for the teacher's outputs ({self._full}), so they are computed each time"
            )
        return tuple(found)

    def _put(self, index: int, kept: dict[str, Tensor]) -> None:
        size = sum(tensor.nbytes for tensor in kept.values())
        if self._bytes + size <= self._budget:
            self._held[index] = kept
            self._bytes += size
        elif not self._full:
            path = self._folder / f"{index}.safetensors"
            try:
                save_file(kept, path)
            except (OSError, SafetensorError) as error:
                self._full = str(error)
                return
            self._files[index] = path
            self._on_disk += size
