"""From a module and a target to the best that some minutes can make of it, in place."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._checks import instance, number, one_of
from secateur._types import Progress
from secateur.calibration import Forward, PaddingSource, call_model
from secateur.comparison import use_threads
from secateur.files import scratch_folder
from secateur.layers import check_model
from secateur.nn import check_dense
from secateur.planning._candidates import CANDIDATES, SHORT, Candidate, candidates
from secateur.planning._means import Means
from secateur.planning._measured import Measured
from secateur.planning._plan import ALLOCATIONS, Inputs, apply_stages_, measure, planned, report_of, timed_point
from secateur.planning._stages import export_stage, stages_of
from secateur.planning._target import MaxLoss, Target
from secateur.pruning import OutputEffect
from secateur.recovery import recover_
from secateur.reports import PlanPoint, PlanReport, Stage

_LEAST = 0.01  # minutes of a training


@dataclass(eq=False)
class _Made:
    """A model that was made of a candidate."""

    candidate: Candidate
    model: nn.Module
    stages: list[dict[str, Any]]
    history: list[Stage]
    figure: float


def optimize_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: str,
    minutes: float = 10.0,
    inputs: Iterable[Any] | None = None,
    allow: Iterable[str] | None = None,
    engines: Iterable[str] | None = None,
    allocation: str = "best",
    forward: Forward | None = None,
    padding: PaddingSource | None = None,
    threads: int | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PlanReport:
    """Make of a model, in place, the one that loses least and reaches a target on this machine, in some minutes.

    It is planned as by :func:`secateur.plan`. Up to three models that reach the target in different ways are made and
    trained for a short time, with the dense model as the teacher; the best, by its output on batches that nobody
    learned from, is trained for the minutes that are left. Where packed layers of PyTorch are best, its layers are
    packed. Where another engine is, the report says which, and :func:`secateur.export` writes the model for it.
    All of the models that are tried are in memory together.

    Args:
        model: dense, any module, on the CPU.
        batches: inputs to learn from, as for :func:`secateur.recover_`; at least two. With six or more, two of them are
            kept to choose by.
        target: as for :func:`secateur.plan`.
        minutes: for all of it.
        inputs, allow, engines, allocation, forward, padding, threads, cache: see :func:`secateur.plan`.
        seed: of training.
        progress: called with a description, and how much of how much is done.

    Returns:
        What was predicted and what was measured. ``metric`` is the error of the output on batches that nobody learned
        from: squared, as a part of the squared output of the dense model; for logits the Kullback-Leibler divergence.

    Raises:
        RecipeError: a target that cannot be reached, with the best that can; the model is as it was.
        StatisticsError: batches that do not fit the model.

    Example:
        >>> import torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> batches = [torch.randn(64, 64) for _ in range(8)]
        >>> means = {"engines": ["torch"], "allow": ["channels"]}
        >>> report = secateur.optimize_(model, batches, target="params=0.6", minutes=0.05, **means)
        >>> model[0]
        Linear(in_features=64, out_features=128, bias=True)
        >>> report.reached
        True
    """
    began = time.perf_counter()
    instance("model", model, nn.Module)
    check_model(model)
    check_dense(model, "there is nothing to plan")
    number("minutes", minutes, above=0.0, finite=True)
    aim, means = Target.parse(instance("target", target, str, "a text such as '4x'")), Means.of(allow, engines)
    one_of("allocation", allocation, ALLOCATIONS)
    tell = progress or (lambda description, done, total: None)
    read = Inputs.of(model, batches, inputs, forward, padding)

    def left() -> float:
        return max(_LEAST, minutes - (time.perf_counter() - began) / 60)

    with use_threads(threads) as count, scratch_folder(None) as folder:
        measured = measure(model, read, means, count, cache, folder, allocation == "uniform", tell)
        found = candidates(measured, aim, CANDIDATES, tell)
        with torch.no_grad():
            error = OutputEffect(model.eval(), *read.compared, read.forward)
        tried: list[_Made] = []
        for candidate in found:
            stages = stages_of(model, measured.parts, candidate.solution)
            made = copy.deepcopy(model)
            history = apply_stages_(made, stages, read, tell)
            if len(found) > 1 and stages:
                _train(made, model, read, min(SHORT * minutes, left()), history, seed, tell)
            with torch.no_grad():
                tried.append(_Made(candidate, made, stages, history, error.of(made.eval())))
        best = min(tried, key=lambda one: one.figure)
        if best.stages:
            _train(best.model, model, read, left(), best.history, seed, tell)
            with torch.no_grad():
                best.figure = error.of(best.model.eval())
        report = _report(measured, aim, best, tried, type(model).__name__, time.perf_counter() - began)
    apply_stages_(model, best.stages, read, tell)
    model.load_state_dict(best.model.state_dict())
    stage = export_stage(best.candidate.solution)
    if stage.get("run") == "pack":
        apply_stages_(model, [stage], read, tell)
    return report


def _train(
    made: nn.Module,
    dense: nn.Module,
    read: Inputs,
    minutes: float,
    history: Sequence[Stage],
    seed: int,
    progress: Progress,
) -> None:
    own = None if read.forward is call_model else read.forward
    recover_(
        made,
        dense,
        read.batches,
        minutes=minutes,
        history=history,
        forward=own,
        padding=read.padding,
        seed=seed,
        progress=progress,
    )


def _report(
    measured: Measured, aim: Target, best: _Made, tried: Sequence[_Made], name: str, seconds: float
) -> PlanReport:
    def point(made: _Made) -> PlanPoint:
        found = timed_point(measured, made.candidate.solution, made.candidate.timed)
        return replace(found, figure=made.figure)

    solution = best.candidate.solution
    report = report_of(measured, aim, MaxLoss(), solution, best.candidate.timed, name)
    stages: list[Mapping[str, Any]] = [*best.stages, {"run": "recover"}] if best.stages else []
    return replace(
        report,
        dense=replace(report.dense, figure=0.0),
        candidates=tuple(point(made) for made in tried),
        measured=point(best),
        parts=planned(measured, solution),
        stages=(*stages, *([stage] if (stage := export_stage(solution)) else [])),
        phases={**report.phases, "making and training": max(0.0, seconds - sum(report.phases.values()))},
    )
