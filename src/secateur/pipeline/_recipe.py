"""A pipeline as TOML: stages in order, each with its settings and gates, all checked before any work."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur._checks import integer, known_keys, one_of
from secateur._errors import RecipeError, SparsityError
from secateur.huggingface import CalibrationText
from secateur.pipeline import _checked as check
from secateur.pipeline._gates import FIGURES, Gate
from secateur.pipeline._stages import KINDS, StageKind

SCHEMA = 1
_TOP = ("schema", "calibration", "evaluate", "shapes", "seed", "stage")
_COMMON = ("run", "gates", "calibration")
SIZES = ("parameters", "sparsity", "sparsity_total", "bytes", "minutes")  # of every stage that makes a model


@dataclass(frozen=True)
class StageRecipe:
    """One stage of a recipe.

    Args:
        number: from 1.
        run: its kind, a key of ``KINDS``.
        settings: checked, without those that every stage has.
        gates: that its model must pass.
        calibration: text to learn from; None if the recipe has none.
        is_sampled: whether the stage itself asks for a number of samples.
        data: files to measure its model on.
    """

    number: int
    run: str
    settings: Mapping[str, Any]
    gates: tuple[Gate, ...]
    calibration: CalibrationText | None
    is_sampled: bool
    data: tuple[Path, ...]

    @property
    def kind(self) -> StageKind:
        return KINDS[self.run]

    @property
    def title(self) -> str:
        return f"stage {self.number} ({self.run})"


@dataclass(frozen=True)
class PipelineRecipe:
    """A whole recipe.

    Args:
        stages: in order.
        shapes: at which speed is measured; none for no measurement.
        text: TOML that the recipe was read from.
    """

    stages: tuple[StageRecipe, ...]
    shapes: tuple[tuple[int, int], ...]
    text: str

    @classmethod
    def from_toml(cls, text: str, folder: Path) -> PipelineRecipe:
        """Return the recipe that TOML text describes.

        Args:
            text: of the recipe.
            folder: to which the files in it are relative.

        Raises:
            RecipeError: not TOML, an unknown key, a value of the wrong type, settings that do not go together, or a
                gate on what nobody measures; with the number of the stage.
        """
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"the recipe is not TOML: {error}.") from None
        if "stage" not in table and (set(table) & {"pattern", "sparsity", "method"}):
            raise RecipeError(
                "this is a recipe of prune alone. Run it so: secateur prune MODEL_DIR --recipe FILE --output OUT.\n"
                f"Or make a pipeline of it: schema = {SCHEMA} at the top, then [[stage]] and run = 'prune' above its "
                "settings."
            )
        with _Typed("the recipe"):
            known_keys("recipe", table, _TOP)
            _check_schema(table)
            stages = table.get("stage")
            if not isinstance(stages, list) or not stages or not all(isinstance(entry, dict) for entry in stages):
                raise RecipeError(
                    "it has no stages. Give at least one: [[stage]], and then run = 'prune', for example."
                )
            seed = integer("seed", table.get("seed", 0), 0)
            shapes = check.shapes(table.get("shapes", []))
            data = check.files(folder, "evaluate", table.get("evaluate", []))
            read = check.calibration(folder, seed)
            shared = read(table["calibration"])[0] if "calibration" in table else None
        found: list[StageRecipe] = []
        for number, entry in enumerate(stages, 1):
            with _Typed(f"stage {number}"):
                if "run" not in entry:
                    raise RecipeError(f"it has no run, which says what it does: one of {', '.join(KINDS)}.")
                run = one_of("stage", entry["run"], KINDS)
            with _Typed(f"stage {number} ({run})"):
                found.append(_stage(number, run, entry, folder, shared, data, seed))
                _check_order(found)
                _check_gates(found[-1], shapes)
        return cls(tuple(found), shapes, text)


def _stage(
    number: int,
    run: str,
    entry: Mapping[str, Any],
    folder: Path,
    shared: CalibrationText | None,
    data: tuple[Path, ...],
    seed: int,
) -> StageRecipe:
    kind = KINDS[run]
    common = _COMMON if kind.learns else _COMMON[:2]
    known_keys("stage", entry, [*common, *kind.keys])
    settings = check.checked("stage", entry, kind.keys, also=common)
    calibration, is_sampled = shared if kind.learns and kind.reads_text(settings) else None, False
    if "calibration" in entry:
        calibration, is_sampled = check.calibration(folder, seed)(entry["calibration"])
    if "seed" in kind.keys:
        settings.setdefault("seed", seed)
    kind.check(settings, calibration)
    gates = tuple(Gate.parse(text) for text in check.texts("gates", entry.get("gates", [])))
    if kind.run is None:
        data = check.files(folder, "data", settings.pop("data")) if "data" in settings else data
        if not data:
            raise RecipeError("there is nothing to measure on. Give data = FILE here, or evaluate = FILE at the top.")
    return StageRecipe(number, run, settings, gates, calibration, is_sampled, data)


def _check_schema(table: Mapping[str, Any]) -> None:
    schema = table.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        said = "it has no schema" if schema is None else f"its schema is {schema!r:.20}"
        raise RecipeError(
            f"{said}; this version of secateur reads schema {SCHEMA}. Write schema = {SCHEMA} at the top."
        )


def _check_order(stages: list[StageRecipe]) -> None:
    final = [stage for stage in stages[:-1] if stage.kind.form]
    if final and stages[-1].kind.run is not None:
        raise RecipeError(
            f"it comes after {final[0].title}, whose model is {final[0].kind.form}, and only dense weights can be "
            "changed.\nPut it before that stage."
        )


def _check_gates(stage: StageRecipe, shapes: tuple[tuple[int, int], ...]) -> None:
    """Refuse gates on figures that cannot be measured, whatever the model is."""
    for gate in stage.gates:
        if gate.figure == "speedup":
            if not shapes:
                raise _unmeasured(gate, "Give shapes at the top, at which to measure: shapes = ['1x128', '8x64'].")
        elif gate.figure in SIZES:
            if gate.figure == "minutes" and stage.kind.run is None:
                raise _unmeasured(gate, "A stage that only measures has no working time. Move the gate to another one.")
        elif not stage.data:
            raise _unmeasured(gate, "Give a file to measure on: evaluate = FILE at the top.")


def check_measured(stage: StageRecipe, metrics: tuple[str, ...]) -> None:
    """Raise if a gate of a stage is on a figure that its files do not give for this model.

    Raises:
        RecipeError: naming the stage, the gate and what is measured.
    """
    for gate in stage.gates:
        if gate.figure not in (*SIZES, "speedup", *metrics):
            names = ", ".join(path.name for path in stage.data)
            raise RecipeError(
                f"{stage.title}: {_unmeasured(gate, f'For this model, {names} gives {_listed(metrics)}.')}"
            )


def _unmeasured(gate: Gate, advice: str) -> RecipeError:
    return RecipeError(f"nobody measures the figure of the gate {str(gate)!r} ({FIGURES[gate.figure]}).\n{advice}")


def _listed(names: tuple[str, ...]) -> str:
    return " and ".join(names) or "nothing"


class _Typed:
    """Puts the name of a part of the recipe in front of errors; a wrong type in a file is a mistake of the recipe."""

    def __init__(self, title: str) -> None:
        self._title = title

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, SparsityError):
            raise type(error)(f"{self._title}: {error}") from None
        if isinstance(error, TypeError):
            raise RecipeError(f"{self._title}: {error}.") from None
