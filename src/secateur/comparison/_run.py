"""Make, measure and time all ways to run some models, in one run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch
from torch import nn

from secateur._types import Progress
from secateur.calibration import call_model, quiet
from secateur.comparison._memory import available, memory_of
from secateur.comparison._open import open_deployed
from secateur.comparison._subject import Subject, state_bytes
from secateur.comparison._ways import REFERENCE, Way
from secateur.engines import ENGINES
from secateur.reports import Figure, WayResult, WayTiming
from secateur.timing import is_noisy, ratios, time_in_turn

Shape = tuple[int, ...]
Measure = Callable[[nn.Module], tuple[tuple[Figure, ...], tuple[str, ...]]]  # figures, the first decides; and notes

_ROOM = 1.1  # memory that must be left for a model, as a multiple of what it took in a process of its own
_MOST_GRAPHS = 64  # of one function, compiled for some models and shapes


@dataclass(frozen=True, eq=False)
class Settings:
    """What all ways share.

    Args:
        batches: inputs to time, by their shape.
        measure: says how good a model is.
        folder: for what is made; it is deleted afterwards by whoever made it.
        with_head: whether models of directories need their head.
        is_directory: whether models are directories.
        threads: to compute with.
        memory: whether memory is measured.
        progress: called with a description, and how much of how much is done.
    """

    batches: Mapping[Shape, Any]
    measure: Measure
    folder: Path
    with_head: bool
    is_directory: bool
    threads: int
    memory: bool
    progress: Progress


@dataclass(eq=False)
class _Candidate:
    """A way that works, with the model that is kept in memory until it was timed."""

    result: WayResult
    model: nn.Module
    calls: dict[Shape, Callable[[], object]] = field(default_factory=dict)


def run_ways(subjects: Sequence[Subject], ways: Iterable[Way], settings: Settings) -> tuple[tuple[WayResult, ...], int]:
    """Run every model in every way.

    Args:
        subjects: the models. The first is the one that all are compared with.
        ways: to run them.
        settings: what all share.

    Returns:
        The ways, those that could not be run among them, and the number of the one that all are compared with.

    Raises:
        Exception: whatever hinders the reference; what hinders others is in their rows.
    """
    jobs = [(subject, way) for subject in subjects for way in ways]
    results: list[WayResult] = []
    candidates: dict[int, _Candidate] = {}
    reference = next(
        number for number, (subject, way) in enumerate(jobs) if subject is subjects[0] and way.name == REFERENCE
    )
    with _compiling_all():
        for number, (subject, way) in enumerate(jobs):
            blank = WayResult(way.name, way.title, subject.name, subject.is_dense)
            settings.progress(f"{way.title}, {subject.name}", number, len(jobs) + len(settings.batches))
            if way.absence:
                results.append(replace(blank, absence=way.absence))
                continue
            try:
                candidate = _tried(subject, way, settings, settings.folder / str(number), blank)
            except Exception as error:  # of other libraries, too: the row says what hinders it
                if number == reference:
                    raise
                results.append(replace(blank, absence=_first_line(error)))
                continue
            candidates[number] = candidate
            results.append(candidate.result)
        for number, timings in _timed(candidates, reference, settings, len(jobs)).items():
            results[number] = replace(results[number], timings=timings)
    return tuple(results), reference


def _tried(subject: Subject, way: Way, settings: Settings, folder: Path, blank: WayResult) -> _Candidate:
    """Make a model for a way, run it on every batch, and say how good it is."""
    notes: list[str] = []
    with _no_warnings():
        deployed = way.make(subject, folder)
        nbytes: int | None = deployed.nbytes
        memory = None
        if settings.memory:
            memory = memory_of(
                deployed,
                way,
                list(settings.batches.values()),
                folder,
                with_head=settings.with_head,
                threads=settings.threads,
                is_directory=settings.is_directory,
            )
            left = available()
            if memory.crashed:
                raise RuntimeError(memory.reason)
            if memory.nbytes is not None and left is not None and left < _ROOM * memory.nbytes:
                raise RuntimeError(
                    f"it takes {memory.nbytes / 1e6:,.0f} MB of memory, and beside the other ways {left / 1e6:,.0f} MB "
                    "are left; compare fewer ways at a time"
                )
            notes += [memory.reason] * bool(memory.reason)
        model = open_deployed(
            deployed,
            way,
            with_head=settings.with_head,
            threads=settings.threads,
            is_directory=settings.is_directory,
        )
        if way.stores_wrapped:
            nbytes = state_bytes(model, folder)
        candidate = _Candidate(blank, model)
        for shape, batch in settings.batches.items():
            call = partial(call_model, model, batch)
            try:
                with quiet(model):
                    call()
            except Exception as error:
                notes.append(f"not at {' x '.join(map(str, shape))}: {_first_line(error)}")
                continue
            candidate.calls[shape] = call
        if not candidate.calls:
            raise RuntimeError(notes[-1].partition(": ")[2])
        figures, remarks = settings.measure(model)
    candidate.result = replace(
        blank,
        nbytes=nbytes,
        memory=None if memory is None else memory.nbytes,
        figures=figures,
        notes=(*deployed.notes, *notes, *remarks),
    )
    return candidate


def _timed(
    candidates: Mapping[int, _Candidate], reference: int, settings: Settings, done: int
) -> dict[int, tuple[WayTiming, ...]]:
    """Time all ways in turn, one shape after the other."""
    timings: dict[int, list[WayTiming]] = {number: [] for number in candidates}
    for place, shape in enumerate(settings.batches):
        what = f"timing all ways at {' x '.join(map(str, shape))}"
        settings.progress(what, done + place, done + len(settings.batches))
        calls = {number: found.calls[shape] for number, found in candidates.items() if shape in found.calls}
        if reference not in calls:
            continue
        with torch.no_grad(), _no_warnings():
            times = time_in_turn(calls, reference, keep=tuple(calls), alone=True)
        for number, found in times.items():
            low, middle, high = quantiles(found, n=4, method="inclusive")
            timings[number].append(
                WayTiming(
                    shape,
                    (1e3 * low, 1e3 * middle, 1e3 * high),
                    ratios(times, reference, number),
                    is_noisy(found),
                )
            )
    return {number: tuple(found) for number, found in timings.items()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__


@contextmanager
def _compiling_all() -> Iterator[None]:
    """Compile as often as it takes: PyTorch counts for all models that share code, and after 8 times runs eagerly."""
    from torch._dynamo import config

    with config.patch(recompile_limit=_MOST_GRAPHS, fail_on_recompile_limit_hit=True):
        yield


@contextmanager
def _no_warnings() -> Iterator[None]:
    """Other libraries warn of what they will change, which is nothing that a user of the command can do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def use_threads(number: int | None) -> Iterator[int]:
    """Set PyTorch's number of threads for a while, and yield it; None leaves it."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield number or before
    finally:
        torch.set_num_threads(before)


def engine_versions() -> dict[str, str]:
    """Return the versions of the engines that are installed."""
    return {engine.name: engine.version for engine in ENGINES.values() if not engine.absence}
