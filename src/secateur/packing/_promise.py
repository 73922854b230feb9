"""The promise about the whole model: as packed, it is not slower than it was, and faster somewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from secateur._types import Progress
from secateur.calibration import Forward
from secateur.nn import Packed, PackedRecurrent, PackedStack, put_in_place_
from secateur.packing._attention import as_dense
from secateur.packing._decide import LOSS
from secateur.packing._jobs import Job
from secateur.packing._recurrent import RecurrentJob
from secateur.packing._stacks import StackJob
from secateur.reports import ModelTime, PackedLayer
from secateur.timing import Timer, ratios, time_in_turn

AnyJob: TypeAlias = Job | StackJob | RecurrentJob
Part: TypeAlias = nn.Module | nn.Parameter
Pairs: TypeAlias = Sequence[tuple[Part, Part]]  # an old part of the model, and what replaces it
Times: TypeAlias = dict[str, dict[str, list[float]]]  # by input and arrangement, seconds of each round

_MOST_INPUTS = 6  # of different shapes
_MOST_GROUPS = 8  # of layers; the groups that take the least time are one
_FEWEST = 5  # rounds; short calls get more, as many as fit into a quarter of a second
_SLOWER = 0.99  # upper quartile of the ratios below which a model is slower, however little
_DENSE, _PACKED = "dense", "packed"


@dataclass(frozen=True)
class Kept:
    """What is left of a choice of layers once the whole model was timed.

    Args:
        rows: entries of the report, in which some layers may have been taken back.
        pairs: what has to be replaced in the model, and by what.
        times: of the whole model before and after.
        notes: what is worth knowing about the times.
    """

    rows: list[PackedLayer]
    pairs: list[tuple[Part, Part]]
    times: tuple[ModelTime, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Swap:
    """What one entry of the report replaces.

    Args:
        row: the number of the entry.
        packed: what has to be replaced for the packed layer.
        dense: the same for the dense layer; empty if the model has it.
    """

    row: int
    packed: Pairs
    dense: Pairs


def keep_promise(
    model: nn.Module,
    jobs: Sequence[AnyJob],
    rows: Sequence[PackedLayer],
    pairs: Pairs,
    batches: Sequence[Any],
    forward: Forward,
    timer: Timer,
    progress: Progress,
) -> Kept:
    """Time the whole model dense and packed, in turn, and take layers back until packing pays, or all of them.

    Packing pays if the model is faster than the dense one by more than noise with one of the inputs, and slower with
    none. Layers are taken back in groups that run alike: each time the group by which the model gains most.

    Args:
        model: as it is before packing. It is the same afterwards.
        jobs: of its layers.
        rows: the entry of each job in the report.
        pairs: what was chosen to be replaced in the model, and by what.
        batches: inputs to time the model with. Of several with the same shapes the first counts.
        forward: how to call the model on one of them.
        timer: returns seconds since any fixed time.
        progress: called with a description, how much is done, and how much there is in total.
    """
    swaps = _swaps(jobs, rows, pairs)
    if not swaps:
        return Kept(list(rows), list(pairs), (), ("no layer is packed, so that the whole model was not timed",))
    own = {id(old) for swap in swaps for old, _ in swap.packed}
    always = [pair for pair in pairs if id(pair[0]) not in own]  # packed before, and dense from now on
    inputs, notes = _inputs(batches)
    with _Stage(model, always, inputs, forward, timer) as stage:
        progress("timing the whole model", 0, 1)
        taken, times = _search(stage, swaps, rows, progress)
    kept = [swap for swap in swaps if swap.row not in taken]
    back = [swap for swap in swaps if swap.row in taken]
    chosen = [
        *always,
        *(pair for swap in kept for pair in swap.packed),
        *(pair for swap in back for pair in swap.dense),
    ]
    after = [as_dense(row, taken[number]) if number in taken else row for number, row in enumerate(rows)]
    return Kept(after, chosen, _model_times(times, bool(kept)), notes)


def _swaps(jobs: Sequence[AnyJob], rows: Sequence[PackedLayer], pairs: Pairs) -> list[_Swap]:
    """What each entry for a packed layer replaces."""
    new = {id(old): (old, replacement) for old, replacement in pairs}
    swaps = []
    for number, (job, row) in enumerate(zip(jobs, rows, strict=True)):
        if row.packed:
            olds = _parts(job)
            swaps.append(_Swap(number, [new[id(old)] for old in olds if id(old) in new], _dense_again(job, olds)))
    return swaps


def _parts(job: AnyJob) -> Sequence[Part]:
    """The parts of a model that a job replaces."""
    match job:
        case Job():
            return job.modules
        case StackJob():
            return (job.old,)
        case RecurrentJob():
            return (job.module,)


def _dense_again(job: AnyJob, olds: Sequence[Part]) -> Pairs:
    """What makes the parts of a job dense, for those that were packed before."""
    if isinstance(job, StackJob):
        return [(old, nn.Parameter(old.to_dense())) for old in olds if isinstance(old, PackedStack)]
    return [(old, job.dense) for old in olds if isinstance(old, Packed | PackedRecurrent)]


def _inputs(batches: Sequence[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """One batch for each shape, by a title, from small to large, and a note if some shapes were left out."""
    found: dict[tuple[Any, ...], Any] = {}
    for batch in batches:
        found.setdefault(_shapes(batch), batch)
    ordered = sorted(found, key=lambda shapes: sum(map(math.prod, shapes)))
    number = min(len(ordered), _MOST_INPUTS)
    picked = [ordered[i * (len(ordered) - 1) // max(number - 1, 1)] for i in range(number)]
    inputs: dict[str, Any] = {}
    for shapes in picked:
        title = " x ".join(map(str, shapes[0])) if shapes else "its input"
        title += f" ({sum(other.startswith(title) for other in inputs) + 1})" if title in inputs else ""
        inputs[title] = found[shapes]
    note = f"the whole model was timed with {number} of the {len(ordered)} shapes of inputs that were given"
    return inputs, () if number == len(ordered) else (note,)


def _shapes(batch: Any) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(leaf.shape) for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))


# Arranging and timing the model


Arrangement: TypeAlias = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]  # a module, its parameters, its modules


class _Stage:
    """A model that is arranged in several ways, in place, and timed: there is never a second copy of what is dense.

    On exit the model is as it was.
    """

    def __init__(
        self, model: nn.Module, always: Pairs, inputs: Mapping[str, Any], forward: Forward, timer: Timer
    ) -> None:
        self._model, self._always, self._inputs, self._forward, self._timer = model, always, inputs, forward, timer
        self._modes: dict[nn.Module, bool] = {}
        self._own = self._snapshot()

    def __enter__(self) -> _Stage:
        return self

    def __exit__(self, *_: object) -> None:
        _arrange(self._own)
        for module, training in self._modes.items():
            module.training = training

    def arrangement(self, swaps: Sequence[_Swap], packed: Sequence[int]) -> Arrangement:
        """Return the model with the entries of some numbers packed, and all others dense."""
        pairs = [pair for swap in swaps for pair in (swap.packed if swap.row in packed else swap.dense)]
        _arrange(self._own)
        put_in_place_(self._model, [*self._always, *pairs])
        for module in self._model.modules():
            self._modes.setdefault(module, module.training)
        self._model.eval()
        return self._snapshot()

    def _snapshot(self) -> Arrangement:
        return [(module, dict(module._parameters), dict(module._modules)) for module in self._model.modules()]

    @torch.no_grad()
    def time(self, arrangements: Mapping[str, Arrangement]) -> Times:
        """Time arrangements by their name, with each input. One of them has the name "dense"."""
        ready = {name: partial(_arrange, arrangement) for name, arrangement in arrangements.items()}
        return {
            title: time_in_turn(
                {name: partial(self._forward, self._model, batch) for name in arrangements},
                _DENSE,
                self._timer,
                keep=tuple(arrangements),
                ready=ready,
                fewest=_FEWEST,
            )
            for title, batch in self._inputs.items()
        }


def _arrange(arrangement: Arrangement) -> None:
    for module, parameters, modules in arrangement:
        for held, wanted in ((module._parameters, parameters), (module._modules, modules)):
            if [(name, id(part)) for name, part in held.items()] != [(name, id(part)) for name, part in wanted.items()]:
                held.clear()
                held.update(wanted)


# What to take back


def _search(
    stage: _Stage, swaps: Sequence[_Swap], rows: Sequence[PackedLayer], progress: Progress
) -> tuple[dict[int, str], Times]:
    """The reason why each entry is taken back, by its number, and the times of what is left as ``"packed"``."""
    everything = [swap.row for swap in swaps]
    dense, packed = stage.arrangement(swaps, []), stage.arrangement(swaps, everything)
    times = stage.time({_DENSE: dense, _PACKED: packed})
    if _why_not(times) is None:
        return {}, times
    groups = _groups(swaps, rows)
    without = {
        f"without {number}": stage.arrangement(swaps, [row for row in everything if row not in group])
        for number, group in enumerate(groups)
        if len(groups) > 1
    }
    measured = stage.time({_DENSE: dense, _PACKED: packed, **without})
    if (why := _why_not(measured)) is None:
        return {}, measured  # the first time something disturbed it
    taken: dict[int, str] = {}
    back: list[int] = []  # numbers of groups
    while len(back) + 1 < len(groups):
        best = max((n for n in range(len(groups)) if n not in back), key=lambda n: _score(measured, [*back, n]))
        if _score(measured, [*back, best]) <= _score(measured, back):
            break  # no further group makes the model faster
        back.append(best)
        taken |= dict.fromkeys(groups[best], _reason(measured, best, len(groups[best])))
        progress("timing the whole model", len(back), len(groups))
        left = stage.arrangement(swaps, [row for row in everything if row not in taken])
        times = stage.time({_DENSE: dense, _PACKED: left})
        if (why := _why_not(times)) is None:
            return taken, times
    rest = f"taken back: with the layers that were left packed, {why}" if taken else f"taken back: packed, {why}"
    return {row: taken.get(row, rest) for row in everything}, times


def _why_not(times: Times) -> str | None:
    """The reason why packing does not pay, or None."""
    reached = {title: ratios(own, _DENSE, _PACKED) for title, own in times.items()}
    slowest, fastest = (pick(reached, key=lambda title: reached[title][1]) for pick in (min, max))
    slower = [title for title, (_, middle, high) in reached.items() if middle < LOSS or high < _SLOWER]
    if slower:
        title = slowest if slowest in slower else slower[0]
        return f"the whole model takes {1 / reached[title][1]:.2f} of its time at {title}"
    if any(low > 1 for low, _, _ in reached.values()):
        return None
    low, middle, high = reached[fastest]
    return (
        "the whole model is not faster by more than noise: at best "
        f"{middle:.2f} times as fast ({low:.2f}-{high:.2f}), at {fastest}"
    )


def _groups(swaps: Sequence[_Swap], rows: Sequence[PackedLayer]) -> list[list[int]]:
    """The numbers of the entries that run alike, the group that takes the most time first."""
    by_kind: dict[tuple[Any, ...], list[int]] = {}
    for swap in swaps:
        row = rows[swap.row]
        routes = tuple(choice.route for choice in row.choices)
        old = type(swap.packed[0][0]).__name__ if swap.packed else ""
        by_kind.setdefault((old, row.shape, row.format, row.value_dtype, routes), []).append(swap.row)

    def seconds(group: list[int]) -> float:
        return sum(choice.dense_seconds for row in group for choice in rows[row].choices)

    groups = sorted(by_kind.values(), key=seconds, reverse=True)
    last = [row for group in groups[_MOST_GROUPS - 1 :] for row in group]
    return [*groups[: _MOST_GROUPS - 1], last] if last else groups


def _score(measured: Times, back: Sequence[int]) -> float:
    """How good the model would be without some groups, if what each of them gains adds up: never slower comes first."""
    reached = []
    for own in measured.values():
        dense, packed = own[_DENSE], own[_PACKED]
        share = median([p / d for p, d in zip(packed, dense, strict=False) if d > 0] or [1.0])
        for number in back:
            alone = zip(packed, own[f"without {number}"], dense, strict=False)
            share -= median([(p - w) / d for p, w, d in alone if d > 0] or [0.0])
        reached.append(1 / max(share, 1e-3))
    worst = min(reached)
    return worst - 1000 if worst < LOSS else sum(map(math.log, reached)) / len(reached)


def _reason(measured: Times, number: int, count: int) -> str:
    """Why a group is taken back: how fast the model is without it, at the input where it gains most."""
    gains = {title: ratios(own, _PACKED, f"without {number}")[1] for title, own in measured.items()}
    title = max(gains, key=lambda title: gains[title])
    more = "" if count == 1 else f" and {count - 1} more"
    return f"taken back: with this layer{more} dense the whole model is {gains[title]:.2f} times as fast at {title}"


def _model_times(times: Times, any_packed: bool) -> tuple[ModelTime, ...]:
    found = []
    for title, own in times.items():
        before = 1e3 * median(own[_DENSE])
        if not any_packed:
            found.append(ModelTime(title, before, before, 1.0, 1.0, 1.0))
            continue
        low, middle, high = ratios(own, _DENSE, _PACKED)
        found.append(ModelTime(title, before, 1e3 * median(own[_PACKED]), middle, low, high))
    return tuple(found)
