"""What a stage of a pipeline may do. One line in the table at the end is all that a further kind of stage needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

from secateur._checks import integer
from secateur._errors import RecipeError
from secateur._types import Progress
from secateur.exporting import ExportSettings, export_directory
from secateur.huggingface import CalibrationText
from secateur.packing import PackSettings, pack_directory
from secateur.pipeline import _checked as check
from secateur.pipeline._between import between_rounds
from secateur.pruning import Recipe, needs_text, prune_directory
from secateur.recovery import RecoverySettings, recover_directory
from secateur.shrinking import check_request, chosen_method, shrink_directory

ROUND_KEYS: Mapping[str, check.Check] = {
    "method": check.text,
    "loss": check.text,
    "minutes": check.number,
    "steps": check.whole,
    "learning_rate": check.number,
}


@dataclass(frozen=True)
class Job:
    """What a stage works on.

    Args:
        source: directory of the model so far.
        output: directory to write.
        dense: directory of the model that the pipeline began with.
        settings: of the stage, checked.
        calibration: text to learn from, if there is one.
        is_sampled: only the samples that ``calibration`` asks for are learned from, also where all text usually is.
        state: folder that a stage may keep its state in, to go on from after it was stopped.
        device: where to compute.
        progress: called with a description, and how much of how much is done.
    """

    source: Path
    output: Path
    dense: Path
    settings: Mapping[str, Any]
    calibration: CalibrationText | None
    is_sampled: bool
    state: Path
    device: str | None
    progress: Progress


class StageReport(Protocol):
    """What every report of a stage can do."""

    def to_json(self) -> str: ...


Settings = Mapping[str, Any]


@dataclass(frozen=True)
class StageKind:
    """A kind of stage.

    Args:
        keys: settings by name, with a check of the type of each.
        check: raises where settings do not go together, given whether there is a text to learn from.
        run: makes the model; None for a stage that only measures.
        needs_dense: the dense model decides the result, too.
        learns: it may learn from text, and so has ``calibration``.
        reads_text: whether it learns from the text of the pipeline with some settings. A text of its own it reads.
        form: what its models are if no stage can change them further: ``"packed"`` or ``"exported"``; else empty.
    """

    keys: Mapping[str, check.Check]
    check: Callable[[Settings, CalibrationText | None], object]
    run: Callable[[Job], StageReport] | None = None
    needs_dense: Callable[[Settings], bool] = field(default=lambda settings: False)
    learns: bool = True
    reads_text: Callable[[Settings], bool] = field(default=lambda settings: True)
    form: str = ""


# Pruning

_TYPES: Mapping[str, check.Check] = {
    "method": check.text_or_table,
    "include": check.texts,
    "exclude": check.texts,
    "sparsity_bounds": check.numbers,
}
_BY_ANNOTATION: Mapping[str, check.Check] = {"bool": check.flag, "int": check.whole, "float | None": check.number}
_PRUNE_KEYS: Mapping[str, check.Check] = {
    **{f.name: _TYPES.get(f.name, _BY_ANNOTATION.get(str(f.type), check.text)) for f in fields(Recipe)},
    "recover": check.table,
}


def recipe_of(settings: Settings) -> Recipe:
    """Return the recipe in the settings of a stage that prunes."""
    return Recipe.from_dict({key: value for key, value in settings.items() if key != "recover"})


def _check_prune(settings: Settings, calibration: CalibrationText | None) -> None:
    recipe = recipe_of(settings)
    if needs_text(recipe) and calibration is None:
        raise RecipeError(
            "this method learns from text: give some with calibration = FILE, or use method = 'magnitude'."
        )
    if "recover" in settings:
        between = check.checked("table recover", settings["recover"], ROUND_KEYS)
        RecoverySettings(**between)
        if settings.get("rounds", 1) < 2:
            raise RecipeError(
                "the table recover says how to train between two rounds of pruning, and there is one round.\n"
                "Give rounds = 4, for example; or a stage of its own, run = 'recover', after this one."
            )
        if calibration is None:
            raise RecipeError("the table recover learns from text: give some with calibration = FILE.")


def _prune(job: Job) -> StageReport:
    recipe, between = recipe_of(job.settings), job.settings.get("recover")
    train = None
    if between is not None:
        assert job.calibration is not None
        train = between_rounds(job.source, job.dense, job.calibration, between, recipe.rounds, job.device, job.progress)
    return prune_directory(
        job.source,
        job.output,
        recipe,
        calibration=job.calibration,
        device=job.device,
        overwrite=True,
        between=train,
        progress=job.progress,
    )


# Shrinking

_SHRINK_KEYS: Mapping[str, check.Check] = {
    "keep": check.table,
    "target": check.table,
    "remove": check.table,
    "zeros": check.flag,
    "method": check.text,
    "allocation": check.text,
    "round_to": check.whole,
    "include": check.texts,
    "exclude": check.texts,
}
REQUEST = ("keep", "target", "remove", "zeros", "round_to")


def _check_shrink(settings: Settings, calibration: CalibrationText | None) -> None:
    asked = {"keep": None, "target": None, "remove": None, "zeros": False}
    which = check_request(**{**asked, **{key: value for key, value in settings.items() if key in REQUEST}})
    chosen_method(settings.get("method"), which, calibration)


def _shrink(job: Job) -> StageReport:
    return shrink_directory(
        job.source,
        job.output,
        calibration=job.calibration,
        latency=False,
        device=job.device,
        overwrite=True,
        progress=job.progress,
        **job.settings,
    )


# Recovery

_RECOVER_KEYS: Mapping[str, check.Check] = {
    **ROUND_KEYS,
    "batch_size": check.whole,
    "sequence_length": check.whole,
    "seed": check.whole,
}
_ONLY_DIRECTORIES = ("batch_size", "sequence_length")


def _check_recover(settings: Settings, calibration: CalibrationText | None) -> None:
    RecoverySettings(**{key: value for key, value in settings.items() if key not in _ONLY_DIRECTORIES})
    for key, least in (("batch_size", 1), ("sequence_length", 16)):
        integer(key, settings.get(key, least), least)
    if calibration is None:
        raise RecipeError("a stage that recovers learns from text: give some with calibration = FILE.")


def _recover(job: Job) -> StageReport:
    assert job.calibration is not None
    return recover_directory(
        job.source,
        job.output,
        dense=job.dense,
        # All of the text is learned from, unless the stage itself asks for a number of samples.
        calibration=job.calibration if job.is_sampled else job.calibration.path,
        device=job.device,
        overwrite=True,
        work=job.state,
        keep_on_interrupt=False,
        progress=job.progress,
        **job.settings,
    )


# Packing

_PACK_KEYS: Mapping[str, check.Check] = {
    "batch_sizes": check.integers,
    "value_dtype": check.text,
    "include": check.texts,
    "exclude": check.texts,
    "memory": check.number,
    "precision": check.text,
    "tolerance": check.number,
}


def _pack(job: Job) -> StageReport:
    return pack_directory(
        job.source,
        job.output,
        PackSettings(**job.settings),
        calibration=job.calibration,
        overwrite=True,
        progress=job.progress,
    )


def _needs_errors(settings: Settings) -> bool:
    return "tolerance" in settings or settings.get("precision", "exact") != "exact"


# Exporting

_EXPORT_KEYS: Mapping[str, check.Check] = {
    "to": check.text,
    "int8": check.flag,
    "bfloat16": check.flag,
    "packed": check.flag,
    "tolerance": check.number,
}


def _check_export(settings: Settings, calibration: CalibrationText | None) -> None:
    made = ExportSettings(**settings)
    made.check_calibration(calibration)
    made.check_installed()


def _export(job: Job) -> StageReport:
    # The pipeline measures speed itself, at the shapes of the recipe.
    settings = {"to": ExportSettings.to, **job.settings}
    report = export_directory(
        job.source,
        job.output,
        **settings,
        calibration=job.calibration,
        shapes=(),
        overwrite=True,
        progress=job.progress,
    )
    assert report is not None  # of an engine
    return report


def _nothing(settings: Settings, calibration: CalibrationText | None) -> None:
    pass


def _check_pack(settings: Settings, calibration: CalibrationText | None) -> None:
    if PackSettings(**settings).tolerance is not None and calibration is None:
        raise RecipeError("a tolerance is measured on text: give some with calibration = FILE.")


KINDS: Mapping[str, StageKind] = {
    "prune": StageKind(_PRUNE_KEYS, _check_prune, _prune, lambda settings: "recover" in settings),
    "shrink": StageKind(_SHRINK_KEYS, _check_shrink, _shrink),
    "recover": StageKind(_RECOVER_KEYS, _check_recover, _recover, lambda settings: True),
    "evaluate": StageKind({"data": check.texts}, _nothing, learns=False),
    "pack": StageKind(_PACK_KEYS, _check_pack, _pack, form="packed", reads_text=_needs_errors),
    # Ranges from a text are another way to compute in 8 bits: only where the stage itself asks for it.
    "export": StageKind(_EXPORT_KEYS, _check_export, _export, form="exported", reads_text=lambda settings: False),
}
