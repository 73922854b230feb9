"""What a training method is: a value that changes the mask of one weight after an optimizer step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch

from secateur.schedules import Cubic, OneShot, Schedule


@dataclass(frozen=True)
class Progress:
    """How far a training is, as :meth:`Method.update` gets it.

    Args:
        step: optimizer steps done; 0 before the first.
        steps: optimizer steps in all.
        sparsity: of the schedule, at this step.
        update_every: steps between updates of a hard mask.
        is_last_of_schedule: the schedule reaches its final sparsity at this step.
        generator: of random numbers, the same in every process.
        optimizer: whose state follows the masks.
    """

    step: int
    steps: int
    sparsity: float
    update_every: int
    is_last_of_schedule: bool
    generator: torch.Generator
    optimizer: torch.optim.Optimizer

    @property
    def due(self) -> bool:
        """Whether hard masks are updated at this step."""
        return self.step % self.update_every == 0 or self.is_last_of_schedule


class Method(ABC):
    """How the mask of one weight changes during training. Methods are values: they compare, print and copy.

    A method of your own is a frozen dataclass with a ``name`` and an :meth:`update`.

    Attributes:
        name: by which ``SparseTraining`` knows it.
        learns: False: pruned weights of any layer are held at zero, and :meth:`update` gets a :class:`MaskedWeight`.
            True: ``SparseTraining`` swaps in layers that learn their mask, and it gets a :class:`LearnedWeight`.
        ramps: whether the sparsity may rise during training.
        reads_gradients: whether updates exchange weights by the gradients of pruned ones.
    """

    name: ClassVar[str]
    learns: ClassVar[bool] = False
    ramps: ClassVar[bool] = True
    reads_gradients: ClassVar[bool] = False

    # Settings that some methods have as fields; the defaults are those of methods without.
    ramp: tuple[float, float] | None = None  # parts of the training at which the sparsity begins to rise and arrives
    freeze: float = 1.0  # part of the training after which the mask stays
    until: float = 1.0  # part of the training up to which weights are exchanged

    def schedule(self, sparsity: float, steps: int) -> Schedule:
        """Return the schedule if none is asked for: cubic over the ramp, else the final sparsity from the start."""
        if self.ramp is None:
            return OneShot(sparsity)
        begin, end = (round(part * steps) for part in self.ramp)
        return Cubic(sparsity, begin, end)

    def last_step(self, steps: int) -> int:
        """Return the step by which the schedule must have reached its final sparsity."""
        return round(self.freeze * steps)

    def wants_gradient(self, step: int, steps: int, update_every: int) -> bool:
        """Return whether the update after ``step`` reads the gradients of pruned weights."""
        return self.reads_gradients and step % update_every == 0 and 0 < step < self.until * steps

    @abstractmethod
    def update(self, weight: Any, progress: Progress) -> None:
        """Change the mask of one weight after an optimizer step, or make the first one at step 0."""

    def to_dict(self) -> dict[str, Any]:
        """Return the name and the settings as plain values."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return {"name": self.name} | {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
