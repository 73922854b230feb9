"""From a directory and a target to the best model that some minutes can make: planned, made, trained and measured."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import tomli_w
import torch

from secateur._checks import number
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.calibration import call_model
from secateur.comparison import use_threads
from secateur.evaluation import METRICS
from secateur.files import Work, check_output, hash_files, scratch_folder, whole_directory, work_folder, write_text
from secateur.huggingface import directory_figures, directory_without_weights, open_model
from secateur.pipeline import DirectoryEvaluation, Gate, Pipeline, input_of, load_to_measure
from secateur.planning._candidates import CANDIDATES, SHORT, Candidate, candidates
from secateur.planning._directory import Request, check_evaluated, measure_opened, open_to_plan
from secateur.planning._measured import Measured
from secateur.planning._plan import planned, predicted_point, report_of, timed_point
from secateur.planning._readme import JSON, PAGE, TOML, say_how
from secateur.planning._split import split_text
from secateur.planning._stages import export_stage, stages_of, title_of
from secateur.reports import PlannedPart, PlanPoint, PlanReport, versions
from secateur.timing import ratios, time_in_turn

_SPEEDS = 4  # models of as many speeds are tried where only the loss is limited
_AT_END = 0.06  # of all minutes, kept for export and the last measurement
_LEAST = 0.05  # minutes of a training
_METRICS = ("perplexity", "accuracy", "rank", "embedding_similarity", "similarity", "spearman")
_LEARN, _CHOOSE, _REPORT = "learning.txt", "choosing.txt", "reporting.txt"


@dataclass(frozen=True)
class _Plan:
    """What is made of a candidate, as it is kept between runs.

    Args:
        title: in a few words.
        way: that runs it.
        stages: of the recipe that change the model.
        export: the stage that makes it for its engine; empty for PyTorch.
        predicted: what the last solution said of it.
        timed: the same as its shape was timed.
        parts: what happens to each part, as JSON.
    """

    title: str
    way: str
    stages: list[dict[str, Any]]
    export: dict[str, Any]
    predicted: PlanPoint
    timed: PlanPoint
    parts: list[dict[str, Any]]

    @classmethod
    def of(cls, measured: Measured, candidate: Candidate) -> _Plan:
        solution, timed = candidate.solution, candidate.timed
        return cls(
            title_of(measured.parts, solution),
            solution.way,
            stages_of(measured.model, measured.parts, solution),
            export_stage(solution),
            predicted_point(measured, solution),
            timed_point(measured, solution, timed),
            [part.to_dict() for part in planned(measured, solution)],
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "way": self.way,
            "stages": self.stages,
            "export": self.export,
            "predicted": self.predicted.to_dict(),
            "timed": self.timed.to_dict(),
            "parts": self.parts,
        }

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> _Plan:
        points = {name: PlanPoint.from_dict(table[name]) for name in ("predicted", "timed")}
        return cls(**{**table, **points})


def optimize_directory(
    source: str | Path,
    output: str | Path,
    *,
    calibration: str | Path,
    target: str | None = None,
    max_loss: str | float | None = None,
    evaluate: str | Path | None = None,
    minutes: float = 30.0,
    shapes: Iterable[Sequence[int]] | None = None,
    allow: Iterable[str] | None = None,
    engines: Iterable[str] | None = None,
    allocation: str | None = None,
    threads: int | None = None,
    samples: int = 128,
    sequence_length: int | None = None,
    seed: int = 0,
    cache: str | Path | None = None,
    overwrite: bool = False,
    restart: bool = False,
    gates: Sequence[str] = (),
    progress: Progress = lambda description, done, total: None,
) -> PlanReport:
    """Make the model that loses least and reaches a target on this machine, in some minutes.

    It is planned as by :func:`plan_directory`. Then up to three models that reach the target in different ways, as
    their times were measured, are made and trained for a short time, with the dense model as the teacher; the best on
    text that nobody learned from is trained for the minutes that are left, made for its engine, and measured.

    ``output`` holds the model ready to load, ``pipeline.toml`` with its stages, to be run again or changed,
    ``plan.json``, ``plan.html`` and a README. What was done lies in ``OUT.work``; the same call goes on there.

    Args:
        source: model directory with safetensors weights: an encoder or a causal language model.
        output: directory to write; it appears complete or not at all.
        calibration: text: plain, or JSON lines. 70 percent of it are learned from, 15 percent choose between models,
            and on 15 percent the result is measured, once.
        target: such as ``"4x"``, ``"12ms"``, ``"20MB"``, ``"params=0.4"``, or several with commas.
        max_loss: the most that may be lost of the figure: ``"1%"`` of the dense model's, or ``0.5`` in its unit.
            Without a target, the fastest model that keeps within is made.
        evaluate: file that the result is measured on, in place of the last part of the text.
        minutes: for all of it.
        shapes: texts and tokens in each at which time counts; None for one text and 32 of the usual length.
        allow, engines, allocation, threads, cache: see :func:`secateur.plan`.
        samples: windows of the text for scores and fits; training learns from all of its part.
        sequence_length: tokens in a window; None for at most 128.
        seed: of the draw of windows, and of training.
        overwrite: replace an existing output directory.
        restart: ignore what earlier runs did.
        gates: that the result must pass, as in a recipe of a pipeline.
        progress: called with a description, and how much of how much is done.

    Returns:
        What was predicted and what was measured. If ``reached`` is False, the result misses the target, or loses more
        than is allowed; it is written anyway, unless a gate failed.

    Raises:
        RecipeError: a target that cannot be reached, with the best that can, before any model is made; a text that is
            too short; or a gate that the result does not pass.
        FormatError: the source is not a safetensors model directory, or the output cannot be written.
        StatisticsError: a file cannot be read.
        ImportError: transformers is missing.
    """
    began = time.perf_counter()
    number("minutes", minutes, above=0.0, finite=True)
    request = Request.of(
        target, max_loss, shapes, allow, engines, allocation, threads, samples, sequence_length, seed, cache
    )
    for gate in gates:
        Gate.parse(gate)
    check_evaluated(source, evaluate)
    split = split_text(calibration)
    directory = open_model(source)
    check_output(directory.path, Path(output), overwrite, directory.num_bytes)
    with work_folder(output, restart=restart) as work, use_threads(threads) as count:
        facts = {"model": hash_files(Path(source)), "text": hash_files(Path(calibration)), **versions()}
        texts = _texts(work, facts, split)
        run = _Run(Path(source), Path(output), request, work, texts, evaluate, minutes, began, tuple(gates), progress)
        plans, report = run.planned(facts, split, count)
        tried = run.tried(plans)
        best = run.best(tried)
        return run.made(tried[best], [point for _, point in tried], report, overwrite)


def _texts(work: Work, facts: Mapping[str, str], split: Any) -> Path:
    """The folder with the three parts of the text."""
    step = work.step("text", {"text": facts["text"]})
    if not step.done:
        for name, text in ((_LEARN, split.learn), (_CHOOSE, split.choose), (_REPORT, split.report)):
            write_text(step.path / name, text)
        step.finish({})
    return step.path


@dataclass
class _Run:
    """One call of :func:`optimize_directory`."""

    source: Path
    output: Path
    request: Request
    work: Work
    texts: Path
    evaluate: str | Path | None
    minutes: float
    began: float
    gates: tuple[str, ...]
    progress: Progress
    spent: float = 0.0  # seconds of earlier runs, of what was found again
    length: int = 0  # tokens in a window
    seconds_to_measure: float = 0.0  # the dense and another model on the text that chooses

    @property
    def reported(self) -> Path:
        """The file that the result is measured on."""
        return self.texts / _REPORT if self.evaluate is None else Path(self.evaluate)

    @property
    def _seconds(self) -> float:
        """That were spent on all of it so far."""
        return time.perf_counter() - self.began + self.spent

    @property
    def left(self) -> float:
        """Minutes that are left."""
        return self.minutes - self._seconds / 60

    def planned(self, facts: Mapping[str, str], split: Any, threads: int) -> tuple[list[_Plan], PlanReport]:
        """The models to try, and what is known before any is made."""
        request = self.request
        asked = replace(request, cache=None, means=replace(request.means, absent={}))
        step = self.work.step("plan", {**facts, "request": repr(asked), "threads": str(threads)})
        if not step.done:
            started = time.perf_counter()
            opened = open_to_plan(self.source, split, request, self.progress)
            with scratch_folder(None) as folder:
                measured = measure_opened(opened, request, threads, folder, self.progress)
                found = self._candidates(measured)
            report = report_of(
                measured, request.target, request.max_loss, found[0].solution, found[0].timed, self.source.name
            )
            plans = [_Plan.of(measured, candidate) for candidate in found]
            record = {
                "plans": [plan.to_dict() for plan in plans],
                "report": report.to_dict(),
                "length": opened.length,
                "seconds": time.perf_counter() - started,
            }
            step.finish(record)
        else:
            self.spent += float(step.record["seconds"])
        self.length = int(step.record["length"])
        plans = [_Plan.from_dict(table) for table in step.record["plans"]]
        return plans, PlanReport.from_dict(step.record["report"])

    def _candidates(self, measured: Measured) -> list[Candidate]:
        target = self.request.target
        if target.text:
            return candidates(measured, target, CANDIDATES, self.progress)
        # Only the loss is limited: models of several speeds, from slow to fast.
        frontier = measured.problem.frontier(target)
        slow, fast = frontier[0].speedup, frontier[-1].speedup
        found: list[Candidate] = []
        for place in range(_SPEEDS):
            speed = slow * (fast / slow) ** (place / (_SPEEDS - 1) * 0.9)
            try:
                found += candidates(measured, replace(target, text=f"{speed:.1f}x", speedup=speed), 1, self.progress)
            except RecipeError:
                continue
        if not found:
            raise RecipeError("no model could be timed that is as fast as was predicted. Give a target, such as '2x'.")
        return found

    def tried(self, plans: Sequence[_Plan]) -> list[tuple[_Plan, PlanPoint]]:
        """Make and train each model for a short time, and measure it on text that nobody learned from."""
        found = []
        for place, plan in enumerate(plans):
            if len(plans) == 1 or not plan.stages:
                found.append((plan, plan.timed))
                continue
            self.progress(f"trying {plan.title}", place, len(plans))
            _, report = self._run_pipeline(plan, self._recipe(plan, [self._short()]))
            started = time.perf_counter()
            measured = self._chooser.measure(report.stages[-1].directory, self.progress)
            # The first one also runs the dense model, as the last measurement of all does.
            self.seconds_to_measure = self.seconds_to_measure or time.perf_counter() - started
            found.append((plan, replace(plan.timed, figure=measured[self._chosen_by])))
        return found

    @property
    def _chosen_by(self) -> str:
        """The figure that decides between models: text alone does, whatever the result is reported on."""
        return self._first_metric(self.texts / _CHOOSE)

    @cached_property
    def _chooser(self) -> DirectoryEvaluation:
        """Measures models on text that nobody learned from; the dense one once."""
        return DirectoryEvaluation(
            self.source, [self.texts / _CHOOSE], has_dense=True, metrics=[self._chosen_by], device="cpu"
        )

    def best(self, tried: Sequence[tuple[_Plan, PlanPoint]]) -> int:
        """The number of the model to go on with."""
        if len(tried) == 1:
            return 0
        sign = 1 if METRICS[self._chosen_by].higher_is_better else -1
        whole = [place for place, (plan, _) in enumerate(tried) if not plan.stages]
        if self.request.target.text:
            if whole:
                return whole[0]  # nothing is removed
            known = [-math.inf if point.figure is None else sign * point.figure for _, point in tried]
            return known.index(max(known))
        dense = self._chooser.dense_figures(self.progress)[self._chosen_by]
        order = sorted(range(len(tried)), key=lambda place: -tried[place][1].speedup)
        for place in order:
            figure = tried[place][1].figure
            if not tried[place][0].stages or (
                figure is not None and self.request.max_loss.allows(figure, dense, sign > 0)
            ):
                return place
        return order[-1]

    def made(
        self, chosen: tuple[_Plan, PlanPoint], points: Sequence[PlanPoint], report: PlanReport, overwrite: bool
    ) -> PlanReport:
        """Train the chosen model for the minutes that are left, make it for its engine, measure and write it."""
        plan, _ = chosen
        trainings = [self._short()] if len(points) > 1 and plan.stages else []
        if plan.stages:
            trainings.append(self._long())
        recipe = self._recipe(plan, trainings, evaluate=self.reported, export=True)
        step, done = self._run_pipeline(plan, recipe)
        if not done.passed:
            raise RecipeError(
                f"{done.failed[0]}\nNothing was written to {self.output}. The results are in {self.work.path}."
            )
        last = done.stages[-1]
        times, milliseconds = self._timed(Path(last.directory), report.shapes)
        point = PlanPoint(
            plan.title,
            plan.way,
            milliseconds,
            times,
            round(last.figures["bytes"]),
            round(last.figures["parameters"]),
            plan.predicted.loss,
            last.figures.get(self.metric),
        )
        dense = done.dense.get(self.metric)
        higher = METRICS[self.metric].higher_is_better
        report = replace(
            report,
            target=self.request.target.text,
            max_loss=self.request.max_loss.text,
            metric=self.metric,
            higher_is_better=higher,
            dense=replace(report.dense, figure=dense),
            candidates=tuple(points),
            predicted=plan.predicted,
            measured=point,
            parts=tuple(PlannedPart.from_dict(table) for table in plan.parts),
            stages=(*plan.stages, *trainings, *([plan.export] if plan.export else [])),
            reached=self._reached(point, dense, higher, report.dense.parameters),
            phases={**report.phases, "making and training": max(0.0, self._seconds - sum(report.phases.values()))},
        )
        self._write(step.path / "model", plan, trainings, report, overwrite)
        return report

    def _timed(self, made: Path, shapes: Sequence[tuple[int, ...]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """How many times as fast as the dense model in PyTorch the result is, and its milliseconds, at each shape."""
        dense = load_to_measure(self.source, False, "cpu").eval()
        model = load_to_measure(made, False, "cpu").eval()
        times, milliseconds = [], []
        for place, (rows, length) in enumerate(shapes):
            self.progress("timing the result", place, len(shapes))
            batch = input_of(dense, (rows, length))
            calls = {"dense": partial(call_model, dense, batch), "made": partial(call_model, model, batch)}
            with torch.no_grad():
                seconds = time_in_turn(calls, "dense", keep=("made",), alone=True)
            times.append(ratios(seconds, "dense", "made")[1])
            milliseconds.append(1e3 * median(seconds["made"]))
        return tuple(times), tuple(milliseconds)

    def _reached(self, point: PlanPoint, dense: float | None, higher: bool, parameters: int) -> bool:
        target = self.request.target
        fits = (
            (target.speedup is None or point.speedup >= target.speedup)
            and (target.milliseconds is None or max(point.milliseconds) <= target.milliseconds)
            and (target.nbytes is None or point.nbytes <= target.nbytes)
            and (target.parameters is None or point.parameters <= target.parameters * parameters)
        )
        if point.figure is None or dense is None:
            return fits and not self.request.max_loss.text
        return fits and self.request.max_loss.allows(point.figure, dense, higher)

    @property
    def metric(self) -> str:
        """The figure that the result is reported by: the first that the file gives."""
        return self._first_metric(self.reported)

    def _first_metric(self, file: Path) -> str:
        gives = directory_figures(directory_without_weights(self.source), file, True)[0]
        return next(name for name in _METRICS if name in gives)

    def _short(self) -> dict[str, Any]:
        return self._training(max(_LEAST, SHORT * self.minutes))

    def _long(self) -> dict[str, Any]:
        """The long training, of which the minutes are kept, so that the same call finds its work again."""
        step = self.work.step("minutes", {"minutes": repr(self.minutes), "work": repr(self.request)})
        if not step.done:
            longer = self.reported.stat().st_size / max((self.texts / _CHOOSE).stat().st_size, 1)
            at_end = _AT_END * self.minutes + self.seconds_to_measure * longer / 60
            step.finish({"minutes": max(_LEAST, self.left - at_end)})
        return self._training(float(step.record["minutes"]))

    def _training(self, minutes: float) -> dict[str, Any]:
        return {"run": "recover", "minutes": round(minutes, 2), "seed": self.request.seed}

    def _recipe(
        self,
        plan: _Plan,
        trainings: Sequence[Mapping[str, Any]],
        *,
        evaluate: Path | None = None,
        shapes: Sequence[Sequence[int]] = (),
        export: bool = False,
        folder: Path | None = None,
    ) -> str:
        """The recipe of a pipeline as TOML."""

        def place(path: Path) -> str:
            return self._name_of(path) if folder is not None else str(path.resolve())

        request = self.request
        sampled = {
            "file": place(self.texts / _LEARN),
            "samples": request.samples,
            "sequence_length": self.length,
            "seed": request.seed,
        }
        stages: list[dict[str, Any]] = [{**stage, "calibration": sampled} for stage in plan.stages]
        stages += [{**stage, "calibration": place(self.texts / _LEARN)} for stage in trainings]
        if export and plan.export:
            stages.append(dict(plan.export))
        gates = {"gates": list(self.gates)} if self.gates else {}
        if evaluate is not None:
            stages.append({"run": "evaluate", "data": place(evaluate), **gates})
        table: dict[str, Any] = {"schema": 1, "seed": request.seed}
        if shapes:
            table["shapes"] = [f"{rows}x{length}" for rows, length in shapes]
        return tomli_w.dumps({**table, "stage": stages})

    def _name_of(self, path: Path) -> str:
        """What a text is called in the output: never as a file of the model, whatever the user calls it."""
        return _LEARN if path == self.texts / _LEARN else Path(_REPORT).stem + path.suffix

    def _run_pipeline(self, plan: _Plan, recipe: str) -> tuple[Any, Any]:
        """Run a recipe in the folder of a plan, where what an earlier recipe of it made is found again."""
        facts = {"model": hash_files(self.source), "stages": json.dumps(plan.stages, sort_keys=True), "way": plan.way}
        step = self.work.step("model", {**facts, "minutes": repr(self.minutes), "request": repr(self.request)})
        report = Pipeline.from_toml(recipe).run(
            self.source, step.path / "model", device="cpu", overwrite=True, progress=self.progress
        )
        return step, report

    def _write(
        self,
        model: Path,
        plan: _Plan,
        trainings: Sequence[Mapping[str, Any]],
        report: PlanReport,
        overwrite: bool,
    ) -> None:
        """Put the model into its place, with the recipe, the texts that it reads, the plan and its page."""
        recipe = self._recipe(
            plan, trainings, evaluate=self.reported, shapes=report.shapes, export=True, folder=self.output
        )
        with whole_directory(self.output, overwrite=overwrite) as made:
            shutil.copytree(model, made, dirs_exist_ok=True)
            shutil.copyfile(self.texts / _LEARN, made / _LEARN)
            shutil.copyfile(self.reported, made / self._name_of(self.reported))
            (made / TOML).write_text(recipe, encoding="utf-8")
            (made / JSON).write_text(report.to_json() + "\n", encoding="utf-8")
            (made / PAGE).write_text(report.to_html(), encoding="utf-8")
            say_how(made, plan.title, plan.export)
