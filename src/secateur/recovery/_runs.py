"""Forward passes of the model and of its teacher, and the problem that a training of the whole model solves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.calibration import Forward, Padding, PaddingSource, parameter_names
from secateur.recovery._losses import Criterion
from secateur.recovery._processes import total, world
from secateur.recovery._seen import Seen, checkpointed, recording
from secateur.recovery._teacher import TeacherOutputs
from secateur.recovery._train import computing
from secateur.recovery._trained import Trained


@dataclass(frozen=True)
class Runner:
    """Runs one model.

    Args:
        model: the model, or its teacher.
        blocks: whose states are recorded.
        repeated: blocks that can keep only their inputs for the backward pass.
        forward: how to call it on a batch.
        padding: which tokens are real, if the batches do not say so.
        autocast: half precision to compute in; None for the model's own.
    """

    model: nn.Module
    blocks: Sequence[nn.Module]
    forward: Forward
    padding: PaddingSource | None = None
    autocast: torch.dtype | None = None
    repeated: Sequence[nn.Module] = ()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(chain(self.model.parameters(), self.model.buffers()), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision of all weights; None if there are several."""
        found = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        return found.pop() if len(found) == 1 else None

    def run(self, batch: Any, *, states: bool = False, again: bool = False) -> Seen:
        """Return a forward pass on one batch.

        Args:
            batch: on any device and in any precision; it is not changed, though models may write to their inputs.
            states: record what the blocks return.
            again: keep only the inputs of the blocks for the backward pass.
        """
        here = to_device(batch, self.device, self.dtype)
        with ExitStack() as stack:
            stack.enter_context(computing(self.autocast, self.device))
            if again:
                stack.enter_context(checkpointed(self.repeated))
            seen = stack.enter_context(recording(self.blocks)) if states else tuple
            given = copied(here)
            padding = self.padding_of(given)
            if padding.disagrees:  # an encoder and a decoder, for example; following them costs time
                stack.enter_context(padding.following())
            output = self.forward(self.model, given)
            return Seen(output, here, tuple(seen()), padding)

    def padding_of(self, batch: Any) -> Padding:
        """Return which tokens of a batch are padding."""
        return Padding.of(batch, parameter_names(self.model), self.padding)


def to_device(batch: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Return a batch with its tensors on a device, and those of 16 or 32 floating-point bits in a dtype."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        fits = dtype is None or not leaf.is_floating_point() or leaf.element_size() not in (2, 4)
        return leaf.to(device) if fits else leaf.to(device, dtype)

    return tree_map(moved, batch)


def copied(values: Any) -> Any:
    """Return a copy of a batch or of arguments."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else copy.copy(leaf), values)


def kept_of(teacher: Runner, batches: Sequence[Any], criterion: Criterion) -> Callable[[int], dict[int, Any]]:
    """Return a function that runs the teacher on a batch, and returns what the loss needs."""

    def compute(index: int) -> dict[int, dict[str, Tensor]]:
        with torch.no_grad():
            seen = teacher.run(batches[index], states=criterion.needs_states)
            return {index: criterion.keep(seen)}

    return compute


@dataclass(frozen=True)
class WholeModel:
    """The training of a whole model.

    Args:
        trained: what moves.
        student: runs the model.
        criterion: the loss.
        batches: all of them.
        train: numbers of those to train on.
        measure: numbers of the held-out ones.
        outputs: what is kept of the teacher, by the number of a batch.
        again: keep only the inputs of the blocks for the backward pass.
    """

    trained: Trained
    student: Runner
    criterion: Criterion
    batches: Sequence[Any]
    train: Sequence[int]
    measure: Sequence[int]
    outputs: TeacherOutputs
    again: bool = False

    def loss(self, index: int) -> Tensor:
        """Return the loss on a training batch."""
        number = self.train[index]
        seen = self.student.run(self.batches[number], states=self.criterion.needs_states, again=self.again)
        return self.criterion.loss(seen, self.outputs[number])

    @torch.no_grad()
    def held_out(self) -> float:
        """Return the mean loss on the held-out batches, each with its number of rows as its weight."""
        rank, size = world()
        summed = count = 0.0
        for number in self.measure[rank::size]:
            seen = self.student.run(self.batches[number], states=self.criterion.needs_states)
            rows = rows_of(self.batches[number])
            summed += rows * float(self.criterion.loss(seen, self.outputs[number]))
            count += rows
        summed, count = total([summed, count], self.student.device)
        return summed / count


def rows_of(batch: Any) -> int:
    """Return how many rows a batch has: the first size of its first tensor."""
    found: list[int] = []
    tree_map(lambda leaf: found.append(len(leaf)) if isinstance(leaf, Tensor) and leaf.ndim else None, batch)
    return found[0] if found else 1
