"""One block after the other reproduces what the dense model's block gave, from the inputs that it has now.

Only one block is trained at a time, so that the optimizer's state, gradients and float32 values are those of one block.

Reference:
    Moritz Wagner, Christophe Roux, Max Zimmer, Sebastian Pokutta, "A Free Lunch in LLM Compression: Revisiting
    Retraining after Pruning", 2025, arXiv:2510.14444.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur._errors import RecipeError
from secateur.calibration import RouteChanged, forward_as, replayed
from secateur.graph import stream_out
from secateur.layers import select_layers
from secateur.recovery._budget import Budget, Clock, Steps, WorkingTime
from secateur.recovery._checkpoint import Checkpoint
from secateur.recovery._processes import total, world
from secateur.recovery._runs import Runner, copied, rows_of
from secateur.recovery._seen import Seen
from secateur.recovery._settings import Settings
from secateur.recovery._teacher import TeacherOutputs
from secateur.recovery._terms import relative_error
from secateur.recovery._train import INTERRUPTED, Loop, Progress, computing
from secateur.recovery._trained import OwnWeights, Trained, free
from secateur.recovery._zeros import no_new_zeros, to_the_end, widened

_Call = tuple[tuple[Any, ...], dict[str, Any]]
Done = tuple[str, Progress, int]  # name of a block, what happened, and how many weights could move


@dataclass(frozen=True)
class _Block:
    """The training of one block.

    Args:
        trained: its weights.
        module: the block.
        calls: what it is called with for each batch; None where it does not run.
        seen: a forward pass of each batch, without an output, for its padding.
        targets: by the number of a batch, what it should return.
        train: numbers of training batches.
        measure: numbers of held-out batches.
        autocast: half precision to compute in, or None.
    """

    trained: Trained
    module: nn.Module
    calls: Sequence[_Call | None]
    seen: Sequence[Seen]
    targets: Callable[[int], Tensor]
    train: Sequence[int]
    measure: Sequence[int]
    autocast: torch.dtype | None

    def loss(self, index: int) -> Tensor:
        """Return the normalised error of the block on a training batch."""
        return self._error(self.train[index])

    @torch.no_grad()
    def held_out(self) -> float:
        """Return the mean error on the held-out batches."""
        rank, size = world()
        rows = {number: rows_of(self.seen[number].batch) for number in self.measure[rank::size]}
        summed = sum(count * float(self._error(number)) for number, count in rows.items())
        device = next(self.module.parameters()).device
        summed, count = total([summed, float(sum(rows.values()))], device)
        return summed / count

    def _error(self, number: int) -> Tensor:
        call = self.calls[number]
        if call is None:
            raise RecipeError(
                f"method='blocks' needs every block to run for every batch, and batch {number} does not reach one of "
                "them. Use method='full', or leave this batch out."
            )
        args, kwargs = copied(call)  # blocks may write to their inputs
        with computing(self.autocast, next(self.module.parameters()).device):
            stream = stream_out(self.module(*args, **kwargs))
        assert stream is not None
        return relative_error(self.seen[number].rows(stream), self.targets(number))


def train_blocks_(
    student: Runner,
    names: Sequence[str],
    targets: TeacherOutputs,
    batches: Sequence[Any],
    train: Sequence[int],
    measure: Sequence[int],
    settings: Settings,
    clock: Clock,
    make_checkpoint: Callable[[str], Checkpoint],
    folder: Path,
    tell: Callable[[str, float], None],
    reserve: float,
    done: list[Done],
) -> None:
    """Train each block of a model in turn.

    Args:
        student: runs the model.
        names: of the blocks that correspond to blocks of the teacher, in order.
        targets: what they should return: for batch b and block j under the number ``b * len(names) + j``.
        batches: all of them, on the model's device.
        train: numbers of training batches.
        measure: numbers of held-out batches.
        settings: of the run.
        clock: of its working time.
        make_checkpoint: for each block, by its name.
        folder: for the values that the blocks had before.
        tell: called with a description and the part of the budget that is used.
        reserve: seconds that are needed after the last block.
        done: gets what was done, block by block, so that it is known after an interrupt. Blocks that are frozen, or
            that cannot be run on their own, are not in it.
    """
    model = student.model
    layers, _ = select_layers(model)
    source = replayed(model, list(batches), layers, student.forward)
    wanted = {id(model.get_submodule(name)): name for name in names}
    passed = 0
    for index, stage in enumerate(source.stages):
        name = wanted.get(id(stage.module)) if stage.once else None
        calls, seen = _calls(source, index, stage.module, len(batches), student, batches)
        if name is None:
            continue
        place = names.index(name)
        module = stage.module
        passed += 1
        parameters = free(module)
        if not parameters:
            continue
        save_file(_own(module), folder / f"before.{place}.safetensors")
        with no_new_zeros(parameters), widened([*module.parameters(), *module.buffers()]) as before:
            wide = [None if call is None else _as_float(call) for call in calls]
            trained = OwnWeights(parameters, before)

            def target(number: int, place: int = place) -> Tensor:
                return targets[number * len(names) + place]["state"]

            problem = _Block(trained, module, wide, seen, target, train, measure, settings.precision)
            finished = passed - 1
            loop = Loop(
                settings,
                clock,
                student.device,
                lambda description, part, finished=finished: tell(description, (finished + part) / len(names)),  # type: ignore[misc]
            )
            share = _share(settings, clock, finished, len(names), reserve)
            progress = loop.run(problem, share, make_checkpoint(name), part=name)
        done.append((name, progress, trained.weights))
        if progress.stopped == INTERRUPTED:
            break


def _share(
    settings: Settings, clock: Clock, passed: int, blocks: int, reserve: float
) -> Callable[[float, float], Budget]:
    """The budget of the next block: an equal part of what is left."""
    left = blocks - passed

    def make(now: float, measuring: float) -> Budget:
        if settings.steps is not None:  # the parts add up to all of the steps
            return Steps(settings.steps * (passed + 1) // blocks - settings.steps * passed // blocks)
        assert settings.minutes is not None
        end = 60 * settings.minutes - reserve
        return WorkingTime(clock, now, now + max(0.0, (end - now) / left - measuring))

    return make


def _own(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of a block, each once, as a file can hold them."""
    return {
        name: parameter.detach().clone(memory_format=torch.contiguous_format)
        for name, parameter in module.named_parameters()
    }


@torch.no_grad()
def undo_(model: nn.Module, names: Sequence[str], folder: Path) -> None:
    """Give blocks the values that they had before."""

    def put_back_() -> None:
        for place, name in enumerate(names):
            path = folder / f"before.{place}.safetensors"
            if path.exists():
                own = dict(model.get_submodule(name).named_parameters())
                for key, value in load_file(path).items():
                    own[key].copy_(value)

    to_the_end(put_back_)


def _as_float(call: _Call) -> _Call:
    """The arguments of a call in float32, as the block is while it learns."""

    def wide(leaf: Any) -> Any:
        narrow = isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.element_size() < 4
        return leaf.float() if narrow else leaf

    args, kwargs = tree_map(wide, call)
    return args, kwargs


def _calls(
    source: Any, index: int, module: nn.Module, count: int, student: Runner, batches: Sequence[Any]
) -> tuple[list[_Call | None], list[Seen]]:
    """What a stage is called with, for each batch; a model that changes its way is run again."""
    calls: list[_Call | None] = []
    run = module.forward
    for number in range(count):
        found: list[_Call] = []

        def note(*args: Any, found: list[_Call] = found, **kwargs: Any) -> object:
            found.append(copy.deepcopy((args, kwargs)))
            return run(*args, **kwargs)

        with forward_as(module, note):
            run_stage(source, index, number)
        calls.append(found[-1] if found else None)
    seen = [Seen(None, batch, (), student.padding_of(batch)) for batch in batches]
    return calls, seen


def run_stage(source: Any, index: int, number: int) -> None:
    """Run a batch up to a stage."""
    try:
        source.run(index, number)
    except RouteChanged:
        source.run(index, number)
