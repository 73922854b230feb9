"""Run the stages of a pipeline one after the other, and go on where an earlier run was stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from secateur._errors import naming
from secateur._types import Progress
from secateur.calibration import read_text
from secateur.files import Work, WorkStep, check_output, hash_files, whole_directory, work_folder, write_text
from secateur.huggingface import open_model
from secateur.pipeline._clock import WorkingTime
from secateur.pipeline._evaluate import DirectoryEvaluation
from secateur.pipeline._figures import ROUNDING, dense_figures, is_plain, speedups, stored_figures
from secateur.pipeline._gates import WITHOUT_DENSE, Gate
from secateur.pipeline._recipe import PipelineRecipe, StageRecipe, check_measured
from secateur.pipeline._stages import Job
from secateur.reports import (
    PRUNING_REPORT,
    GateResult,
    PipelineReport,
    PipelineStage,
    stages_to_json,
    versions,
)
from secateur.shrinking import stages_in

JSON, TOML, PAGE = "pipeline.json", "pipeline.toml", "pipeline.html"
_MODEL = "model"  # in the folder of a step
_STATE = "state"


def run_pipeline(
    recipe: PipelineRecipe,
    source: Path,
    output: Path,
    *,
    device: str | None,
    overwrite: bool,
    restart: bool,
    progress: Progress,
) -> PipelineReport:
    """Run a recipe; see :meth:`Pipeline.run`."""
    directory = open_model(source)
    check_output(directory.path, output, overwrite, directory.num_bytes)
    check_texts(recipe)
    evaluations = evaluations_of(recipe, source, device)
    with work_folder(output, restart=restart) as work:
        runner = _Runner(recipe, source, work, device, progress, evaluations)
        stages: list[PipelineStage] = []
        model = source
        report = runner.report(output, stages)
        for stage in recipe.stages:
            made, model = runner.stage(stage, model)
            stages.append(made)
            report = runner.report(output, stages)
            if made.failed:
                break
        if report.passed:
            _write(report, model, source, output, overwrite)
        write_text(work.path / JSON, report.to_json() + "\n")
        write_text(work.path / PAGE, report.to_html())
    return report


def check_texts(recipe: PipelineRecipe) -> None:
    """Raise unless all texts to learn from can be read, so that none is missed after hours of work.

    Raises:
        SparsityError: with the number of the stage.
    """
    for stage in recipe.stages:
        if stage.calibration is not None:
            with naming(stage.title):
                read_text(stage.calibration.path)


def evaluations_of(
    recipe: PipelineRecipe, source: Path, device: str | None
) -> dict[tuple[Path, ...], DirectoryEvaluation]:
    """Return what measures the models, by the files that it reads, after checking that all gates can be measured.

    Raises:
        SparsityError: a file gives nothing for this model, or a gate is on a figure that no file gives.
    """
    found: dict[tuple[Path, ...], DirectoryEvaluation] = {}
    for stage in recipe.stages:
        if stage.data and stage.data not in found:
            found[stage.data] = DirectoryEvaluation(source, stage.data, has_dense=True, device=device)
        check_measured(stage, found[stage.data].metrics if stage.data else ())
    return found


@dataclass
class _Runner:
    """What all stages share while a pipeline runs."""

    recipe: PipelineRecipe
    source: Path
    work: Work
    device: str | None
    progress: Progress
    evaluations: Mapping[tuple[Path, ...], DirectoryEvaluation]
    dense: dict[str, float] = field(default_factory=dict)
    hashes: dict[Path, str] = field(default_factory=dict)
    considered: dict[str, Any] = field(default_factory=dict)  # include and exclude of the last stage that pruned
    sizes: dict[str, float] = field(default_factory=dict)  # figures of the model of the stage before
    dense_sizes: dict[str, dict[str, float]] = field(default_factory=dict)  # by what is considered

    def stage(self, stage: StageRecipe, model: Path) -> tuple[PipelineStage, Path]:
        """Run one stage on the model in a directory, and return what it made and the directory of its model."""
        step: WorkStep | None = None
        reused, record = False, dict[str, Any]()
        with naming(stage.title):
            if stage.run == "prune":
                self.considered = {key: stage.settings[key] for key in ("include", "exclude") if key in stage.settings}
            if stage.kind.run is not None:
                step = self.work.step(stage.run, self._facts(stage, model), stage.number)
                reused, model = step.done, self._made(stage, step, model)
                record = dict(step.record)
            measured = self._measured(stage, model)
        figures = {**measured["figures"], **({"minutes": record["seconds"] / 60} if record else {})}
        figures = {name: float(value) for name, value in figures.items()}
        rounding = figures.pop(ROUNDING, 0.0)
        self.dense |= {name: float(value) for name, value in measured["dense"].items() if name != ROUNDING}
        made = PipelineStage(
            number=stage.number,
            run=stage.run,
            settings=dict(stage.settings),
            directory=str(model),
            summary=tuple(record.get("summary", ())),
            figures=figures,
            speeds=measured["speeds"],
            gates=tuple(self._gate(gate, figures, rounding) for gate in stage.gates),
            reused=reused,
            changed=() if step is None else step.changed,
            notes=(*measured["notes"], *self._overlap(stage)),
        )
        return made, model

    def report(self, output: Path, stages: list[PipelineStage]) -> PipelineReport:
        """Return the report of the stages so far."""
        return PipelineReport(
            model=str(self.source),
            output=str(output),
            stages=tuple(stages),
            planned=len(self.recipe.stages),
            dense=dict(self.dense),
            recipe=self.recipe.text,
            versions=versions(),
            work=str(self.work.path),
        )

    def _facts(self, stage: StageRecipe, model: Path) -> dict[str, str]:
        """All that decides what a stage makes, by the names under which a change of it is told."""
        text = stage.calibration
        facts = {
            "model": self._hash(model),
            "settings": json.dumps(stage.settings, sort_keys=True, default=str),
            "device": str(self.device),
            **versions(),
        }
        if text is not None:
            facts["text"] = self._hash(text.path)
            facts["sampling"] = f"{text.samples} {text.sequence_length} {text.seed} {stage.is_sampled}"
            if text.select != "random":
                facts["sampling"] += f" {text.select}"
        if stage.kind.needs_dense(stage.settings):
            facts["dense model"] = self._hash(self.source)
        return facts

    def _made(self, stage: StageRecipe, step: WorkStep, model: Path) -> Path:
        """The directory of the model that a stage makes, which it does unless an earlier run did."""
        output = step.path / _MODEL
        if step.done:
            return output
        assert stage.kind.run is not None
        clock = WorkingTime(step.path)
        with clock.counting(self._told(stage)) as progress:
            job = Job(
                source=model,
                output=output,
                dense=self.source,
                settings=stage.settings,
                calibration=stage.calibration,
                is_sampled=stage.is_sampled,
                state=step.path / _STATE,
                device=self.device,
                progress=progress,
            )
            report = stage.kind.run(job)
        step.finish({"seconds": clock.seconds, "summary": str(report).splitlines()})
        shutil.rmtree(step.path / _STATE, ignore_errors=True)
        return output

    def _measured(self, stage: StageRecipe, model: Path) -> Mapping[str, Any]:
        """The figures of a model: size, zeros, quality and speed."""
        facts = {
            "model": self._hash(model),
            "dense model": self._hash(self.source),
            "data": json.dumps([self._hash(path) for path in stage.data]),
            "shapes": json.dumps(self.recipe.shapes),
            "considered": json.dumps(self.considered),
            "device": str(self.device),
            **versions(),
        }
        step = self.work.step("measure", facts, stage.number)
        if not step.done:
            step.finish(self._measure(stage, model))
        self.sizes = dict(step.record["figures"])
        return step.record

    def _measure(self, stage: StageRecipe, model: Path) -> dict[str, Any]:
        told = self._told(stage)
        told("measuring", 0, 1)
        considered = json.dumps(self.considered)
        if considered not in self.dense_sizes:
            self.dense_sizes[considered] = dense_figures(self.source, **self.considered)
        dense = dict(self.dense_sizes[considered])
        figures = dense_figures(model, **self.considered) if is_plain(model) else stored_figures(model, self.sizes)
        notes: list[str] = []
        if stage.data:
            evaluation = self.evaluations[stage.data]
            report = evaluation.measure(model, told)
            dense |= evaluation.dense_figures(told)
            for found in reversed(report.figures):  # of several files that give one figure, the first counts
                figures[found.metric] = found.value
            notes += report.notes
        speeds: dict[str, float] = {}
        if self.recipe.shapes:
            speeds = speedups(self.source, model, self.recipe.shapes, self.device, told)
            figures["speedup"] = min(speeds.values())
        plain = {"figures": figures, "dense": dense, "speeds": speeds}
        texts = {key: {name: _text(value) for name, value in table.items()} for key, table in plain.items()}
        return {**texts, "notes": notes}

    def _overlap(self, stage: StageRecipe) -> tuple[str, ...]:
        """A note where a stage is measured on what it learned from."""
        if stage.calibration is None:
            return ()
        text = stage.calibration.path
        if all(self._hash(path) != self._hash(text) for path in stage.data):
            return ()
        return (f"it is measured on {text.name}, from which it learned; give another text to measure on",)

    def _gate(self, gate: Gate, figures: Mapping[str, float], rounding: float) -> GateResult:
        value = figures.get(gate.figure)
        dense = None if gate.figure in WITHOUT_DENSE else self.dense.get(gate.figure)
        slack = rounding if gate.figure == "sparsity" else 0.0
        passed = gate.passes(value, dense, slack)
        return GateResult(str(gate), gate.figure, value, dense, gate.bound(dense), passed)

    def _hash(self, path: Path) -> str:
        if path not in self.hashes:
            self.hashes[path] = hash_files(path)
        return self.hashes[path]

    def _told(self, stage: StageRecipe) -> Progress:
        title = f"stage {stage.number} of {len(self.recipe.stages)}, {stage.run}"
        return lambda description, done, total: self.progress(f"{title}: {description}", done, total)


def _text(value: float) -> float | str:
    return value if value - value == 0 else str(value)  # JSON has no name for what is not finite


def _write(report: PipelineReport, model: Path, source: Path, output: Path, overwrite: bool) -> None:
    """Put the last model into its place, with the reports of all stages."""
    reports = list(stages_in(source))
    for stage in report.stages:
        # Each directory may carry the reports of earlier stages, too; its own is the last one.
        if stage.run in ("prune", "shrink", "recover"):
            reports += stages_in(Path(stage.directory))[-1:]
    with whole_directory(output, overwrite=overwrite) as made:
        shutil.copytree(model, made, dirs_exist_ok=True)
        if reports:
            (made / PRUNING_REPORT).write_text(stages_to_json(reports) + "\n", encoding="utf-8")
        (made / JSON).write_text(report.to_json() + "\n", encoding="utf-8")
        (made / TOML).write_text(report.recipe, encoding="utf-8")
        (made / PAGE).write_text(report.to_html(), encoding="utf-8")
