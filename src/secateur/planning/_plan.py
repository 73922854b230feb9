"""A plan for a module: what could be made of it, solved again for other targets without running it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur._checks import instance, one_of
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import (
    Forward,
    Padding,
    PaddingSource,
    call_model,
    evenly,
    fit_arguments,
    load_batches,
    parameter_names,
)
from secateur.comparison import by_shape, engine_versions, use_threads, usual
from secateur.exporting import export
from secateur.files import scratch_folder
from secateur.layers import check_model
from secateur.nn import check_dense
from secateur.packing import machine, pack_
from secateur.planning._effects import few_rows
from secateur.planning._means import Means
from secateur.planning._measured import Measured, measure_all
from secateur.planning._probes import Timed
from secateur.planning._solutions import Solution
from secateur.planning._stages import export_stage, planned_parts, stages_of, title_of
from secateur.planning._target import MaxLoss, Target
from secateur.pruning import prune_
from secateur.reports import PlanPoint, PlanReport, Stage, versions
from secateur.shrinking import shrink_

ALLOCATIONS = ("best", "uniform")
_COMPARED = 2  # batches on which outputs are compared
METRIC = "output error"


@dataclass(eq=False)
class Plan:
    """What is to be made of a model, and all that was measured for it.

    Made by :func:`secateur.plan`. It holds the model that it is for, which is not changed.

    Args:
        report: targets, predictions, the frontier, and what happens to each part.
        solution: what was decided; None where only the frontier was asked for.

    Example:
        >>> import torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> plan = secateur.plan(model, [torch.randn(64, 64)], engines=["torch"], allow=["channels"])
        >>> plan.stages, plan.solve("params=0.3").stages
        ((), ({'run': 'shrink', 'keep': {'channels': 0.25}},))
    """

    report: PlanReport
    solution: Solution | None
    _measured: Measured = field(repr=False)
    _inputs: Inputs = field(repr=False)

    @property
    def stages(self) -> tuple[Mapping[str, Any], ...]:
        """The stages that make the model, with their settings, as a recipe of a pipeline has them."""
        return self.report.stages

    def solve(self, target: str) -> Plan:
        """Return the plan for another target. Nothing is measured and no model is run, so that it takes a moment.

        Args:
            target: such as ``"4x"``, ``"12ms"``, ``"20MB"`` or ``"params=0.4"``.

        Raises:
            RecipeError: it cannot be reached, or is no target.
        """
        aim = Target.parse(target)
        solution = self._measured.problem.solve(aim)
        # The curve over all speeds is another one only where something else is limited, too.
        is_same = _without_time(aim) == _without_time(Target.parse(self.report.target or None))
        report = report_of(
            self._measured,
            aim,
            MaxLoss(self.report.max_loss),
            solution,
            None,
            self.report.model,
            self.report.frontier if is_same else None,
        )
        return Plan(report, solution, self._measured, self._inputs)

    def apply_(self, model: nn.Module, progress: Progress | None = None) -> list[Stage]:
        """Make of a model what the plan says, in place: remove units, and write zeros. It does not recover from that.

        Args:
            model: the dense one that the plan was made for, or a copy of it.
            progress: called with a description, and how much of how much is done.

        Returns:
            The reports of all stages, which :func:`secateur.recover_` and :func:`secateur.pack_` take as ``history``.

        Raises:
            RecipeError: the plan has nothing decided, or the model is another one.
        """
        if self.solution is None:
            raise RecipeError("the plan has no target, so that nothing is decided. Solve it first: plan.solve('4x').")
        return apply_stages_(model, self.stages, self._inputs, progress)

    def export(self, path: str | Path, model: nn.Module | None = None) -> None:
        """Write a model for the engine that the plan found to be best.

        Args:
            path: of the directory to make.
            model: that :meth:`apply_` or :func:`secateur.optimize_` made; None makes one of the plan's own model.

        Raises:
            RecipeError: the plan runs the model in PyTorch, so that there is nothing to export.
        """
        if self.solution is None:
            raise RecipeError("the plan has no target, so that nothing is decided. Solve it first: plan.solve('4x').")
        stage = export_stage(self.solution)
        if stage.pop("run", "") != "export":
            raise RecipeError(
                f"the plan runs the model in PyTorch ({self.solution.way}), and there is nothing to export.\nUse "
                "plan.apply_(model), and secateur.pack_(model) where the plan says packed."
            )
        made = model
        if made is None:
            made = copy.deepcopy(self._measured.model)
            self.apply_(made)
        export(made, few_rows(self._inputs.batches[0], 2), path, shapes=(), **stage)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Batches, and how a model runs on them.

    Args:
        batches: to learn from, as the model takes them.
        paddings: of each.
        compared: batches on which outputs are compared while choosing, and their paddings.
        timed: inputs at which time counts, by their shape.
        forward: how to call the model.
        padding: as it was given.
    """

    batches: list[Any]
    paddings: list[Padding]
    compared: tuple[list[Any], list[Padding]]
    timed: Mapping[tuple[int, ...], Any]
    forward: Forward
    padding: PaddingSource | None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batches: Iterable[Any],
        timed: Iterable[Any] | None,
        forward: Forward | None,
        padding: PaddingSource | None,
    ) -> Inputs:
        """Read batches. A few of them, spread evenly, are kept to compare outputs on, where there are enough."""
        cpu = torch.device("cpu")
        loaded = load_batches(batches, cpu)
        if forward is None:
            loaded = fit_arguments(model, loaded, cpu).batches
        held = set(evenly(_COMPARED, len(loaded))) if len(loaded) >= 3 * _COMPARED else set()
        learned = [batch for number, batch in enumerate(loaded) if number not in held]
        compared = [few_rows(loaded[number]) for number in sorted(held or range(min(_COMPARED, len(loaded))))]
        names = parameter_names(model) if forward is None else ()

        def paddings(found: Sequence[Any]) -> list[Padding]:
            return [Padding.of(batch, names, padding) for batch in found]

        given = usual(loaded[0]) if timed is None else load_batches(timed, cpu)
        if forward is None and timed is not None:
            given = fit_arguments(model, given, cpu).batches
        return cls(
            learned,
            paddings(learned),
            (compared, paddings(compared)),
            by_shape(given),
            forward or call_model,
            padding,
        )


def plan(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    target: str | None = None,
    inputs: Iterable[Any] | None = None,
    allow: Iterable[str] | None = None,
    engines: Iterable[str] | None = None,
    allocation: str = "best",
    forward: Forward | None = None,
    padding: PaddingSource | None = None,
    threads: int | None = None,
    cache: str | Path | None = None,
    progress: Progress | None = None,
) -> Plan:
    """Say what could be made of a model to reach a target on this machine, and what that would lose. It is not changed.

    What can go is found; models of a few other shapes are timed in each engine, and what each thing that may be done
    does to the output is measured alone, after compensation. From that follows, exactly, the choice for every part
    with the least loss that reaches the target. A model of that shape is timed, and the costs are corrected by it.

    Args:
        model: dense, any module, on the CPU.
        batches: inputs to learn from, as for :func:`secateur.prune_`.
        target: ``"4x"``: times as fast as this model in PyTorch, at every input; ``"12ms"``; ``"20MB"``;
            ``"params=0.4"``; or several with commas. None only shows the frontier.
        inputs: at which time counts, one for each shape; None for the first batch, and its first row alone.
        allow: what may be done: ``layers``, ``ffn``, ``heads``, ``channels``, ``experts``, ``unstructured``, ``2:4``,
            ``block``, ``int8``, ``bfloat16``; None for all.
        engines: that may run it: ``torch``, ``onnxruntime``, ``openvino``; None for all that are installed.
        allocation: ``"best"``, or ``"uniform"`` for the same size in all parts of a kind.
        forward: ``forward(model, batch)`` runs the model, if its batches are of none of the usual forms.
        padding: as for :func:`secateur.prune_`.
        threads: to compute with; None for PyTorch's number.
        cache: file of measured times, so that another plan on this machine needs none; None for this process only.
        progress: called with a description, and how much of how much is done.

    Returns:
        The plan. ``plan.report`` has the predictions and the frontier, ``plan.apply_(model)`` makes the model,
        ``plan.export(path)`` writes it for the engine that is best, and ``plan.solve(target)`` solves it again.

    Raises:
        RecipeError: a target that cannot be reached, with the best that can; names that do not exist.
        StatisticsError: batches that do not fit the model.

    Example:
        >>> import torch, secateur
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 64))
        >>> batches = [torch.randn(64, 64) for _ in range(8)]
        >>> plan = secateur.plan(model, batches, target="params=0.6", engines=["torch"], allow=["channels"])
        >>> plan.stages
        ({'run': 'shrink', 'keep': {'channels': 0.5}},)
        >>> _ = plan.apply_(model)
        >>> model[0]
        Linear(in_features=64, out_features=128, bias=True)

    References:
        Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", 2022, arXiv:2201.13096; Kurtic et al.,
        "ZipLM: Inference-Aware Structured Pruning of Language Models", 2023, arXiv:2302.04089.
    """
    instance("model", model, nn.Module)
    check_model(model)
    check_dense(model, "there is nothing to plan")
    aim = Target.parse(target)
    means = Means.of(allow, engines)
    one_of("allocation", allocation, ALLOCATIONS)
    tell = progress or (lambda description, done, total: None)
    read = Inputs.of(model, batches, inputs, forward, padding)
    with use_threads(threads) as number, scratch_folder(None) as folder:
        measured = measure(model, read, means, number, cache, folder, allocation == "uniform", tell)
        solution, timed = (None, None) if target is None else measured.corrected(aim, tell)
        report = report_of(measured, aim, MaxLoss(), solution, timed, type(model).__name__)
    return Plan(report, solution, measured, read)


def measure(
    model: nn.Module,
    inputs: Inputs,
    means: Means,
    threads: int,
    cache: str | Path | None,
    folder: Path,
    uniform: bool,
    progress: Progress,
) -> Measured:
    """Measure all that a plan follows from. For the arguments see :func:`measure_all`."""
    return measure_all(
        model,
        inputs.batches,
        inputs.paddings,
        inputs.timed,
        means,
        small=inputs.compared,
        forward=inputs.forward,
        threads=threads,
        cache=cache,
        folder=folder,
        uniform=uniform,
        progress=progress,
    )


def apply_stages_(
    model: nn.Module, stages: Sequence[Mapping[str, Any]], inputs: Inputs, progress: Progress | None
) -> list[Stage]:
    """Run the stages of a recipe that change a module, and return their reports."""
    history: list[Stage] = []
    for stage in stages:
        settings = {name: value for name, value in stage.items() if name != "run"}
        own = None if inputs.forward is call_model else inputs.forward
        if stage["run"] == "shrink":
            history.append(
                shrink_(
                    model,
                    inputs.batches,
                    **settings,
                    history=history,
                    forward=own,
                    padding=inputs.padding,
                    progress=progress,
                )
            )
        elif stage["run"] == "prune":
            history.append(
                prune_(model, inputs.batches, **settings, forward=own, padding=inputs.padding, progress=progress)
            )
        elif stage["run"] == "pack":
            pack_(model, batches=inputs.batches[:1], **settings, history=history)
    return history


def report_of(
    measured: Measured,
    target: Target,
    max_loss: MaxLoss,
    solution: Solution | None,
    timed: Timed | None,
    model: str,
    frontier: tuple[PlanPoint, ...] | None = None,
) -> PlanReport:
    """Return what is known before anything is made. A frontier that is known already is not solved for again."""
    problem, bench = measured.problem, measured.bench
    shapes = tuple(bench.timed)
    alternatives = tuple(
        _point("dense", way, found, bench.milliseconds, problem.parameters) for way, found in measured.dense.items()
    )
    dense = PlanPoint(
        "dense", "torch", bench.milliseconds, (1.0,) * len(shapes), _nbytes(measured), problem.parameters, 0.0
    )
    if frontier is None:
        found = problem.frontier(replace(target, speedup=None, milliseconds=None))
        frontier = tuple(predicted_point(measured, one) for one in found)
    report = PlanReport(
        model=model,
        target=target.text,
        max_loss=max_loss.text,
        metric=METRIC,
        higher_is_better=False,
        shapes=shapes,
        dense=dense,
        alternatives=alternatives,
        frontier=frontier,
        rounds=tuple(measured.rounds),
        phases=dict(measured.seconds),
        threads=bench.threads,
        machine=machine(),
        notes=_notes(measured),
        versions={**versions(), **engine_versions()},
    )
    if solution is None:
        return report
    point = predicted_point(measured, solution)
    if timed is not None:
        candidate = timed_point(measured, solution, timed)
        report = replace(report, candidates=(candidate,))
    return replace(
        report,
        predicted=point,
        parts=planned(measured, solution),
        stages=tuple(stages_of(measured.model, measured.parts, solution)),
        reached=timed is None or measured.reaches(target, timed),
        notes=(*report.notes, *_about(measured, solution)),
    )


def _without_time(target: Target) -> Target:
    return replace(target, text="", speedup=None, milliseconds=None)


def predicted_point(measured: Measured, solution: Solution) -> PlanPoint:
    """Return a solution as a point of a report."""
    return PlanPoint(
        title_of(measured.parts, solution),
        solution.way,
        solution.milliseconds,
        solution.times,
        solution.nbytes,
        solution.parameters,
        solution.loss,
    )


def timed_point(measured: Measured, solution: Solution, timed: Timed) -> PlanPoint:
    """Return a solution as a point of a report, with the times of a model of its shape."""
    return replace(
        predicted_point(measured, solution),
        milliseconds=timed.milliseconds(measured.bench.milliseconds),
        times=timed.times,
        nbytes=timed.nbytes,
    )


def planned(measured: Measured, solution: Solution) -> Any:
    """Return what happens to each part, with what each loses and saves."""
    # Without corrections, which are about the whole model.
    costs, effects = replace(measured.problem.costs[solution.way], factor=()), measured.problem.effects
    whole = costs.dense[:-1]
    losses, saved = [], []
    gone = max(solution.depth.number, 1)
    for part, choice in zip(measured.parts, solution.choices, strict=True):
        losses.append(solution.depth.loss / gone if choice.is_removed else effects.of(part, choice))
        less = costs.whole[part.kind] - (0 if choice.is_removed else costs.of(part, choice))
        share = less[:-1] / whole
        saved.append(float(min(max(share.max(), 0.0), 1.0)))
    return planned_parts(measured.parts, solution, losses, saved)


def _point(title: str, way: str, timed: Timed, dense: Sequence[float], parameters: int) -> PlanPoint:
    return PlanPoint(title, way, timed.milliseconds(dense), timed.times, timed.nbytes, parameters, timed.effect)


def _nbytes(measured: Measured) -> int:
    return sum(tensor.nbytes for tensor in measured.model.state_dict().values())


def _notes(measured: Measured) -> tuple[str, ...]:
    notes = [f"not used: {way}: {why}" for way, why in measured.absent.items()]
    noisy = [way for way, costs in measured.problem.costs.items() if costs.noisy]
    if noisy:
        notes.append(f"the machine was busy while {', '.join(noisy)} was timed, so that its costs are less certain")
    return tuple(notes)


def _about(measured: Measured, solution: Solution) -> tuple[str, ...]:
    if title_of(measured.parts, solution) == "nothing removed":
        return (f"nothing has to be removed: the dense model reaches the target in {solution.way}",)
    if solution.is_uniform:
        return ("all parts are alike: a choice for each part of its own loses as much",)
    return ()
