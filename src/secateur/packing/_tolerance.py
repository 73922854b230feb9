"""The fastest precision of each layer that keeps the error of its outputs, and of the model's, within a tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from secateur._errors import SparsityError
from secateur.formats import is_scaled
from secateur.kernels import PRECISIONS, RoutePlan, can_run, candidates
from secateur.packing._decide import SLACK, Decision, decide
from secateur.packing._jobs import Job
from secateur.packing._measure import Measurement
from secateur.packing._output_error import Pairs, layer_error, outputs_of
from secateur.packing._settings import PackSettings
from secateur.packing._weights import packed_as
from secateur.timing import MeasurementCache, Timer

_STORED = (torch.bfloat16, torch.int8)  # what is tried besides the dtype of the weight


@dataclass(frozen=True)
class Chosen:
    """How one layer is packed.

    Args:
        job: the layer, with its weight as it is to be stored.
        decision: how it should run.
        error: the relative error of its outputs; None where no input of it was seen.
        next: the fastest way that is more exact, to go back to; None if the layer is exact.
    """

    job: Job
    decision: Decision
    error: float | None = None
    next: Chosen | None = None


def choose_within(
    job: Job,
    inputs: Sequence[Tensor],
    settings: PackSettings,
    cold: bool,
    known: MeasurementCache[Measurement],
    timer: Timer,
) -> Chosen:
    """Return the fastest way to run a layer whose outputs keep within the tolerance of the settings.

    Args:
        job: the layer, with its weight stored in its own dtype.
        inputs: of the layer; without any only exact arithmetic on the weight as it is can be chosen.
        settings: how to pack, with a tolerance.
        cold: whether the layer will find its weight in memory and not in a cache.
        known: measurements of layers that run alike.
        timer: returns seconds since any fixed time.
    """
    assert settings.tolerance is not None
    options: list[Chosen] = []
    expected = outputs_of(job.dense, inputs)
    for variant in _variants(job, settings):
        is_own = variant.packed is job.packed
        precisions = _precisions(variant, settings)
        errors = {p: e for p, e in _errors(variant, precisions, inputs, expected) if e <= settings.tolerance}
        if is_own:
            errors.setdefault("exact", 0.0)
        allowed = tuple(precision for precision in PRECISIONS if precision in errors)
        if not allowed:
            continue
        trial = replace(variant, precisions=allowed)
        measured = trial.measured(settings, cold, known, timer)
        decision = decide(measured, job.dense_bytes, settings.memory, allowed)
        taken = () if decision.plan is None else decision.plan.routes
        error = max((errors[route.precision] for route in taken), default=0.0)
        options.append(Chosen(trial, decision, error if inputs else None))
        if is_own:
            own = replace(job, precisions=("exact",))
            exact = Chosen(own, decide(measured, job.dense_bytes, settings.memory), 0.0 if inputs else None)
            options.append(exact)
    return _with_next(options)


def _with_next(options: Sequence[Chosen]) -> Chosen:
    """The fastest of some ways to run a layer, with the fastest of those that are much more exact, and so on."""
    best = _fastest(options)
    better = [option for option in options if _rounded(option.error) <= _rounded(best.error) / 2]
    return best if _rounded(best.error) == 0 else replace(best, next=_with_next(better))


def _variants(job: Job, settings: PackSettings) -> Iterator[Job]:
    """The layer in its own dtype, and in those of fewer bits unless the settings name one."""
    yield job
    if settings.value_dtype is not None or is_scaled(job.packed.value_dtype):
        return
    for dtype in _STORED:
        if dtype == job.packed.value_dtype:
            continue
        try:
            yield replace(job, packed=packed_as(job.weight, job.patterns, dtype, takes_whole=True))
        except SparsityError:  # a weight that the dtype cannot hold
            continue


def _precisions(job: Job, settings: PackSettings) -> tuple[str, ...]:
    """The arithmetic that is worth trying. The same products with values of fewer bits take fewer bytes."""
    if is_scaled(job.packed.value_dtype):
        return PRECISIONS
    fewer = settings.value_dtype is not None or job.packed.value_dtype in _STORED
    return ("exact", "bfloat16") if fewer else ("exact",)


def _errors(
    job: Job, precisions: Sequence[str], inputs: Sequence[Tensor], expected: Sequence[Tensor]
) -> Iterator[tuple[str, float]]:
    """The relative error of a layer's outputs in each arithmetic that a route has here."""
    if not inputs:
        return
    routes = candidates(job.packed, job.patterns, precisions)
    # All routes of one arithmetic have the same error, but for the order of sums. The last one is a dense one.
    by_precision = {route.precision: route for route in routes if can_run(job.packed, route, inputs[0])}
    for precision, route in by_precision.items():
        yield precision, layer_error(job.built(RoutePlan((route,))), inputs, expected)


def _fastest(options: Sequence[Chosen]) -> Chosen:
    """The fastest of some ways to run a layer; of those that are nearly as fast, the one with the smallest error."""
    speeds = [_speed(option.decision) for option in options]
    near = [option for option, speed in zip(options, speeds, strict=True) if speed >= max(speeds) - SLACK]
    return min(near, key=lambda option: (_rounded(option.error), option.job.packed.nbytes))


def _speed(decision: Decision) -> float:
    """The mean logarithm of the ratios; those of a layer that should stay dense come last."""
    reached = [math.log(max(choice.ratio, 1e-9)) for choice in decision.choices]
    mean = sum(reached) / len(reached) if reached else -math.inf
    return mean if decision.plan is not None else mean - 1000 if reached else -1e9


def _rounded(error: float | None) -> float:
    """An error without what the order of sums makes of it."""
    return 0.0 if error is None or error < 1e-6 else error


def take_back(
    chosen: Sequence[Chosen],
    tolerance: float,
    error_with: Callable[[Pairs], float],
    error_alone: Callable[[Pairs], float],
) -> tuple[list[Chosen], list[Pairs], dict[int, float]]:
    """Make layers more exact until the outputs of the model keep within the tolerance, the worst one first.

    Args:
        chosen: how each layer is packed.
        tolerance: the largest relative error of the model's outputs.
        error_with: returns the error of the model with some parts replaced.
        error_alone: the same for one layer alone, on fewer inputs.

    Returns:
        How each layer is packed now, what has to be replaced in the model for it, and for the numbers of those that
        were taken back the error that the model had with it alone.
    """
    found = list(chosen)
    pairs: list[Pairs] = [option.job.pairs(option.decision) for option in chosen]
    error = error_with([pair for own in pairs for pair in own])
    taken: dict[int, float] = {}
    left = {number: option for number, option in enumerate(chosen) if option.next is not None}
    if error <= tolerance or not left:
        return found, pairs, taken
    shares = {number: error_alone(pairs[number]) for number in left}
    alone = dict(shares)
    while error > tolerance and shares:
        # The errors of layers are nearly independent, so that their squares add up. One is taken back at least.
        wanted, changed = (tolerance / error) ** 2 * _squares(shares), set[int]()
        while shares and (not changed or _squares(shares) > wanted):
            number = max(shares, key=lambda number: shares[number])
            was, now = found[number], found[number].next
            assert now is not None
            found[number], taken[number] = now, alone[number]
            changed.add(number)
            if now.next is None:
                del shares[number]
            else:
                shares[number] *= _rounded(now.error) / _rounded(was.error)
        for number in changed:
            pairs[number] = found[number].job.pairs(found[number].decision)
        error = error_with([pair for own in pairs for pair in own])
    return found, pairs, taken


def _squares(shares: Mapping[int, float]) -> float:
    return sum(share**2 for share in shares.values())
