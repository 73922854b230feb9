"""Run a model stage by stage on calibration batches, without computing the earlier stages again.

Stage k is calibrated on the outputs of the stages before it as they are after pruning. For every stage and batch the
model's own forward is called, so that whatever happens between blocks (masks, rotary embeddings, residual streams) is
the model's own code. But only two stages are computed: the one before, on its inputs kept from the last round, and this
one. Earlier stages return NaN.

That is right for a model whose stages pass on everything through what they return. A rehearsal on the dense model finds
out whether this model is one: every stage must return the same output when it is replayed as in a plain forward pass.
If one does not, every pass computes everything. That is slower, but the statistics are the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur.calibration._batches import Forward, call_model
from secateur.calibration._stages import PlainRun, Stage, find_stages, fingerprint, forward_as, same_output
from secateur.layers import Layer

_Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


class StageSource(Protocol):
    """Runs the stages of a model, one after the other, each on all batches.

    A source decides how the inputs of a stage come about: which weights are in memory, and what is computed again.
    :class:`Replay` is the one for a model that is in memory as a whole.
    """

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All stages, in the order in which they must be run."""

    @property
    def batches(self) -> Sequence[Any]:
        """The calibration batches."""

    def run(self, stage_index: int, batch_index: int) -> object:
        """Call the layers of a stage with the inputs that a batch gives them; return the stage's output."""


def replayed(
    model: nn.Module,
    batches: list[Any],
    layers: Iterable[Layer],
    forward: Forward = call_model,
    sequential: bool = True,
) -> Replay:
    """Cut a model into stages and return what runs them.

    Args:
        model: in the state that :func:`quiet` establishes.
        batches: what :func:`load_batches` returned; never changed.
        layers: all layers to prune.
        forward: how to call the model on a batch.
        sequential: False makes the whole model one stage.
    """
    if not sequential:
        return Replay(model, (Stage("", model, tuple(layers)),), batches, forward, skips=False)
    stages, runs = find_stages(model, layers, batches, forward)
    skips = len(stages) > 1 and all(_rehearse(model, stages, run, forward) for run in runs)
    return Replay(model, stages, batches, forward, skips)


def _rehearse(model: nn.Module, stages: tuple[Stage, ...], run: PlainRun, forward: Forward) -> bool:
    """Whether replaying the dense model stage by stage gives what a plain forward pass gave."""
    if run.modules != [stage.module for stage in stages if stage.once]:
        return False  # this batch skips a stage that others run, or runs one twice
    rehearsal = Replay(model, stages, [run.batch], forward, skips=True)
    for index, (_, expected) in enumerate(run.outputs):
        try:
            output = rehearsal.run(index, 0)
        except Exception:  # code between stages fails on NaN: the model needs what was not computed
            return False
        if not same_output(fingerprint(output), expected):
            return False
    return True


@dataclass
class _Trail:
    """What one batch leaves behind for the replay of the next stage."""

    call: _Call | None = None  # arguments of the stage that ran last
    outputs: dict[int, Any] = field(default_factory=dict)  # of the stages before that one, as templates


class Replay:
    """Runs each batch up to and including a stage. Stages are run in order, and may be pruned after their run.

    Args:
        model: in the state that :func:`quiet` establishes.
        stages: of the model.
        batches: to run; never changed.
        forward: how to call the model on a batch.
        skips: whether all but two stages may be skipped, as :func:`replayed` finds out.
    """

    def __init__(
        self, model: nn.Module, stages: tuple[Stage, ...], batches: Sequence[Any], forward: Forward, skips: bool
    ) -> None:
        self.stages = stages
        self.batches = batches
        self._model = model
        self._forward = forward
        self._skips = skips
        self._trails = [_Trail() for _ in batches]

    @property
    def mode(self) -> str:
        """How stages get their inputs, for the report: see :class:`secateur.Report`."""
        if len(self.stages) == 1:
            return "one pass"
        return "sequential with replay" if self._skips else "sequential in full"

    def run(self, stage_index: int, batch_index: int) -> object:
        """Run one batch up to and including a stage, and return the stage's output."""
        stage, trail = self.stages[stage_index], self._trails[batch_index]
        output: object = None

        def observe(*args: Any, **kwargs: Any) -> object:
            nonlocal output
            # A copy, because some stages write to their inputs, and these are needed again.
            trail.call = (args, kwargs) if self._skips else None
            args, kwargs = copy.deepcopy((args, kwargs))
            output = run_stage(*args, **kwargs)
            raise _Reached

        with ExitStack() as stack:
            if self._skips and stage.once and stage_index > 0:
                for earlier, template in trail.outputs.items():
                    stack.enter_context(forward_as(self.stages[earlier].module, partial(_poison, template)))
                previous = self.stages[stage_index - 1].module
                run_previous, call = previous.forward, trail.call
                assert call is not None

                def rerun(*args: Any, **kwargs: Any) -> object:
                    returned = run_previous(*call[0], **call[1])
                    trail.outputs[stage_index - 1] = tree_map(_template, returned)
                    return returned

                stack.enter_context(forward_as(previous, rerun))
            if stage.once:
                run_stage = stage.module.forward
                stack.enter_context(forward_as(stage.module, observe))
            with suppress(_Reached):
                self._forward(self._model, copy.deepcopy(self.batches[batch_index]))
        return output


class _Reached(BaseException):
    """Ends a forward pass once the stage has run. Not an Exception, so that no model's own handler catches it."""


@dataclass(frozen=True)
class _Template:
    """What is remembered of a tensor that a stage returned."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


def _template(leaf: Any) -> Any:
    return _Template(leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf


def _poison(template: Any, *args: Any, **kwargs: Any) -> Any:
    """A forward function that computes nothing: tensors like the real ones, full of NaN (zero where there is none)."""

    def fill(leaf: Any) -> Any:
        if not isinstance(leaf, _Template):
            return leaf
        value = math.nan if leaf.dtype.is_floating_point else 0
        return torch.full(leaf.shape, value, dtype=leaf.dtype, device=leaf.device)

    return tree_map(fill, template)
