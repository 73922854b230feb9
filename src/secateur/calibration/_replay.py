"""Run a model stage by stage on calibration batches, without computing the earlier stages again.

Stage k is calibrated on the outputs of the stages before it as they are after pruning. For every stage and batch the
model's own forward is called, so that whatever happens between blocks (masks, rotary embeddings, residual streams) is
the model's own code. But only two stages are computed: the one before, on its inputs kept from the last round, and this
one. Earlier stages return NaN.

That is right for a model whose stages pass on everything through what they return. A rehearsal on the dense model finds
out whether this model is one: every stage must return the same output when it is replayed as in a plain forward pass.
If one does not, every pass computes everything. That is slower, but the statistics are the same.

The rehearsal runs one batch of each kind. So every other batch is watched while it runs: it must take the same *route*,
the same modules in the same order. A batch that takes another one is computed in full from there on, and so are all
batches of a model that looks at what its stages computed, as one does that exits early: there a NaN would decide.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from secateur._errors import SparsityError
from secateur.calibration._batches import Forward, call_model, code_path
from secateur.calibration._stages import (
    PlainRun,
    Stage,
    find_stages,
    fingerprint,
    forward_as,
    same_output,
    watched_modules,
)
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
        return Replay(model, (Stage("", model, tuple(layers)),), batches, forward, "one pass")
    stages, runs = find_stages(model, layers, batches, forward)
    routes = {code_path(run.batch): _rehearsed(model, stages, run, forward) for run in runs}
    return Replay(model, stages, batches, forward, [routes.get(code_path(batch), _NO_BLOCKS) for batch in batches])


@dataclass(frozen=True)
class Route:
    """Which modules a batch runs.

    Args:
        calls: the modules in order, those of the stages and their neighbours; None if that may differ each time.
        skips: whether all but two stages may be skipped.
        why: a batch is computed in full, or empty.
        speaks: whether a stage returns plain values, by which it may ask to be run again.
    """

    calls: tuple[nn.Module, ...] | None
    skips: bool
    why: str = ""
    speaks: bool = True


_NO_BLOCKS = Route(None, skips=False, why="the model has no repeated blocks")


def _rehearsed(model: nn.Module, stages: tuple[Stage, ...], run: PlainRun, forward: Forward) -> Route:
    """The route of a batch, and whether replaying the dense model on it gives what a plain forward pass gave."""
    if run.decides:
        return Route(None, skips=False, why="the model decides by its data what to run")
    replayable = [id(stage.module) for stage in stages if stage.once]
    outputs = {id(module): output for module, output in zip(run.calls, run.outputs, strict=True) if output is not None}
    speaks = any(
        not isinstance(part, Tensor) and part is not type(None) for output in outputs.values() for part in output
    )
    alone = Route(run.calls, skips=False, why="its blocks pass on more than what they return", speaks=speaks)
    if len(stages) < 2 or [id(module) for module in run.calls if id(module) in outputs] != replayable:
        return replace(alone, why="its blocks do not run once each, one after the other")
    replayed_route = Route(run.calls, skips=True, speaks=speaks)
    rehearsal = Replay(model, stages, [run.batch], forward, [replayed_route])
    for index, key in enumerate(replayable):
        try:
            output = rehearsal.run(index, 0)
        except (Exception, RouteChanged):  # code between stages fails on NaN: the model needs what was not computed
            return alone
        if not same_output(fingerprint(output), outputs[key]):
            return alone
    return replayed_route


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
        routes: of each batch, as :func:`replayed` finds out; or why all of them are computed in full.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: tuple[Stage, ...],
        batches: Sequence[Any],
        forward: Forward,
        routes: Sequence[Route] | str,
    ) -> None:
        self.stages = stages
        self.batches = batches
        self._model = model
        self._forward = forward
        self._one_pass = isinstance(routes, str)
        full = [Route(None, skips=False, why=str(routes))] * len(batches)
        self._routes = full if isinstance(routes, str) else list(routes)
        self._trails = [_Trail() for _ in batches]
        self._watched = watched_modules(model, [stage.module for stage in stages if stage.module is not model])

    @property
    def mode(self) -> str:
        """How stages got their inputs so far, for the report: see :class:`secateur.Report`."""
        if self._one_pass or (len(self.stages) == 1 and self.stages[0].module is self._model):
            return "one pass"
        full = Counter(route.why for route in self._routes if not route.skips)
        if not full:
            return "sequential with replay"
        total = len(self._routes)
        how = "sequential in full" if full.total() == total else "sequential with replay, but for some batches"
        return f"{how} ({'; '.join(f'{count} of {total} batches: {why}' for why, count in full.items())})"

    def run(self, stage_index: int, batch_index: int) -> object:
        """Run one batch up to and including a stage, and return the stage's output if it runs once.

        Raises:
            RouteChanged: the batch does not take the route of the rehearsal. Run it again; it is then computed in full.
        """
        stage, trail, route = self.stages[stage_index], self._trails[batch_index], self._routes[batch_index]
        if route.calls is None or not stage.once:
            self._forward(self._model, copy.deepcopy(self.batches[batch_index]))
            return None
        walk = _Walk(route.calls)
        runs = {id(module): module.forward for module in self._watched}
        output: object = None

        def observe(*args: Any, **kwargs: Any) -> object:
            nonlocal output
            # A copy, because some stages write to their inputs, and these are needed again.
            trail.call = (args, kwargs) if route.skips else None
            args, kwargs = copy.deepcopy((args, kwargs))
            output = run_stage(*args, **kwargs)
            walk.seen = True
            if not route.speaks and walk.is_complete:
                raise _Reached
            return output

        if route.skips and stage_index > 0:
            for earlier, template in trail.outputs.items():
                runs[id(self.stages[earlier].module)] = partial(_poison, template)
            previous, call = self.stages[stage_index - 1].module, trail.call
            run_previous = previous.forward
            assert call is not None

            def rerun(*args: Any, **kwargs: Any) -> object:
                returned = run_previous(*call[0], **call[1])
                trail.outputs[stage_index - 1] = tree_map(_template, returned)
                return returned

            runs[id(previous)] = rerun
        run_stage = runs[id(stage.module)]
        runs[id(stage.module)] = observe
        try:
            with ExitStack() as stack:
                for module in self._watched:
                    stack.enter_context(forward_as(module, partial(walk.call, module, runs[id(module)])))
                self._forward(self._model, copy.deepcopy(self.batches[batch_index]))
                walk.end()
        except _Reached:
            pass
        except RouteChanged:
            self._in_full(batch_index, "they take another route than the rehearsal")
            raise
        except SparsityError:
            raise
        except Exception:  # once the stage has run, code that is here for nothing else may fail on NaN
            if not walk.seen:
                if not route.skips:
                    raise
                self._in_full(batch_index, "they need what is not computed again")
                raise RouteChanged from None
        return output

    def _in_full(self, batch_index: int, why: str) -> None:
        self._routes[batch_index] = Route(None, skips=False, why=why)
        self._trails[batch_index] = _Trail()


class _Walk:
    """One forward pass, compared with the route that it should take. It ends at the next module after the stage."""

    def __init__(self, expected: tuple[nn.Module, ...]) -> None:
        self._expected = expected
        self._done = 0
        self.seen = False  # whether the stage has run

    @property
    def is_complete(self) -> bool:
        return self._done == len(self._expected)

    def call(self, module: nn.Module, run: Callable[..., object], *args: Any, **kwargs: Any) -> object:
        """Run a module, if it is its turn."""
        if self.is_complete or self._expected[self._done] is not module:
            raise RouteChanged
        if self.seen:
            raise _Reached
        self._done += 1
        return run(*args, **kwargs)

    def end(self) -> None:
        """Check that nothing is missing."""
        if not self.is_complete:
            raise RouteChanged


class RouteChanged(BaseException):
    """A batch took another route than the rehearsal. What was gathered of it is void; the next run computes it in full.

    Not an Exception, so that no model's own handler catches it.
    """


class _Reached(BaseException):
    """Ends a forward pass after the stage has run. Not an Exception, so that no model's own handler catches it."""


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
