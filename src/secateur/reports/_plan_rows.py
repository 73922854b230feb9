"""The tables of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.reports._compare_records import shape_text
from secateur.reports._compare_rows import megabytes
from secateur.reports._plan_records import PlannedPart, PlanPoint
from secateur.reports._tables import Table, TableColumn, bars, figure

_KINDS = {
    "dense": "dense model",
    "alternative": "weights as they are",
    "candidate": "made on the way",
    "predicted": "chosen, predicted",
    "measured": "chosen, measured",
}
_MOST_PREDICTED = 16  # points of the frontier that the table shows; files have all


def times_text(times: float) -> str:
    """Return a speedup in words: ``"4.14 times as fast"``."""
    return f"{times:.2f} times as fast"


def percent(value: float, other: float) -> str:
    """Return by how much a value differs from another one: ``"+1.7 %"``."""
    return f"{100 * (value / other - 1):+.1f} %"


def models_table(
    known: Sequence[tuple[str, PlanPoint]],
    frontier: Sequence[PlanPoint],
    shapes: Sequence[tuple[int, ...]],
    metric: str,
    measure: str,
) -> Table:
    """Return a table of all models: what there is, what was made, what was chosen, and what could be made.

    Args:
        known: what a point is, and the point.
        frontier: the least predicted loss for each speed.
        shapes: of the inputs.
        metric: name of the figures.
        measure: what losses are measured by.
    """
    shown = _spread(frontier, _MOST_PREDICTED)
    rows: list[tuple[str, ...]] = []
    strong: list[tuple[int, int]] = []
    sections, last = [], ""
    for kind, point in [*known, *(("frontier", point) for point in shown)]:
        if kind != last and (last, kind) != ("dense", "alternative"):
            sections.append(len(rows))
        if kind in ("predicted", "measured"):
            strong += [(len(rows), column) for column in (1, 3)]
        last = kind
        rows.append(
            (
                point.title,
                _KINDS.get(kind, "predicted"),
                point.way,
                f"{point.speedup:.2f} x",
                *map(figure, point.milliseconds),
                megabytes(point.nbytes),
                f"{point.parameters:,}",
                figure(point.loss),
                figure(point.figure),
            )
        )
    columns = (
        TableColumn("model"),
        TableColumn("", is_name=True),
        TableColumn("way", is_name=True),
        TableColumn("speed", is_number=True),
        *(TableColumn(f"ms at {shape_text(shape)}", is_number=True) for shape in shapes),
        TableColumn("disk, MB", is_number=True),
        TableColumn("parameters", is_number=True),
        TableColumn(measure, is_number=True),
        TableColumn(metric.replace("_", " "), is_number=True),
    )
    notes = [
        "Speed: times as fast as the dense model in PyTorch"
        + (", at the shape where that is least." if len(shapes) > 1 else ".")
        + f" {measure[:1].upper()}{measure[1:]}: of the model before recovery."
    ]
    if len(shown) < len(frontier):
        notes.append(f"{len(shown)} of {len(frontier)} predicted models are shown. JSON and CSV have all.")
    return Table("Models", columns, tuple(rows), tuple(notes), tuple(sections), tuple(strong))


def _spread(points: Sequence[PlanPoint], most: int) -> list[PlanPoint]:
    """Some of many points, the first and the last among them."""
    if len(points) <= most:
        return list(points)
    return [points[round(index * (len(points) - 1) / (most - 1))] for index in range(most)]


def parts_table(parts: Sequence[PlannedPart], measure: str) -> Table:
    """Return a table of what happens to each part of the chosen model.

    Args:
        parts: of the model.
        measure: what losses are measured by.
    """
    kinds = unit_kinds(parts)
    columns = (
        TableColumn("part"),
        TableColumn("", is_name=True),
        *(TableColumn(f"{kind} kept", is_number=True, bars=_kept_bars(parts, kind)) for kind in kinds),
        TableColumn("zeros", is_number=True),
        TableColumn("pattern", is_name=True),
        TableColumn(measure, is_number=True, bars=bars([max(part.loss, 0.0) for part in parts])),
        TableColumn("time saved", is_number=True),
    )
    rows = tuple(
        (
            part.name,
            what_happens(part),
            *(_kept(part, kind) for kind in kinds),
            f"{part.sparsity:.1%}" if part.sparsity else "",
            part.pattern,
            figure(part.loss) if part.loss else "",
            f"{part.saved:.1%}" if part.saved else "",
        )
        for part in parts
    )
    notes = (
        f"{measure[:1].upper()}{measure[1:]}: of the whole model if this were done alone. Time saved: of the dense "
        "model's, at the shape where that is most.",
    )
    return Table("What happens to each part", columns, rows, notes if rows else ())


def unit_kinds(parts: Sequence[PlannedPart]) -> list[str]:
    """Return the kinds of units that parts have, in the order in which they are first found."""
    return list(dict.fromkeys(kind for part in parts for kind in part.kept))


def what_happens(part: PlannedPart) -> str:
    """Return in a word what happens to a part."""
    if part.is_removed:
        return "removed"
    fewer = any(stay < of for stay, of in part.kept.values())
    found = ["smaller"] * fewer + ["sparse"] * (part.sparsity > 0)
    return " and ".join(found) or "as it is"


def _kept(part: PlannedPart, kind: str) -> str:
    if kind not in part.kept or part.is_removed:
        return ""
    stay, of = part.kept[kind]
    return f"{stay:,} of {of:,}"


def _kept_bars(parts: Sequence[PlannedPart], kind: str) -> tuple[float, ...]:
    shares = [part.kept.get(kind, (0, 0)) for part in parts]
    return tuple(min(max(stay / of, 0.0), 1.0) if of else 0.0 for stay, of in shares)


def differences_table(
    rounds: Sequence[tuple[tuple[float, ...], tuple[float, ...]]], shapes: Sequence[tuple[int, ...]]
) -> Table:
    """Return a table of predicted and measured milliseconds, a section for each round in which they were compared.

    Args:
        rounds: predicted and measured milliseconds by shape.
        shapes: of the inputs.
    """
    columns = (
        TableColumn("round"),
        TableColumn("input", is_name=True),
        *(TableColumn(heading, is_number=True) for heading in ("predicted, ms", "measured, ms", "difference")),
    )
    rows = tuple(
        (f"{number}", shape_text(shape), figure(guess), figure(known), percent(known, guess))
        for number, (predicted, measured) in enumerate(rounds, 1)
        for shape, guess, known in zip(shapes, predicted, measured, strict=True)
    )
    sections = tuple(range(0, len(rows), max(len(shapes), 1)))
    notes = ("What a round measured corrects the costs that the next one is solved with.",) if rows else ()
    return Table("Predicted and measured times", columns, rows, notes, sections)


def recipe_table(stages: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table of the stages of the recipe that makes the chosen model."""
    columns = TableColumn("stage"), TableColumn("settings", is_note=False)
    rows = tuple(
        (
            f"{number}. {stage.get('run', '')}",
            ", ".join(f"{name} = {_setting(value)}" for name, value in stage.items() if name != "run"),
        )
        for number, stage in enumerate(stages, 1)
    )
    return Table("The recipe", columns, rows)


def _setting(value: Any) -> str:
    text = "yes" if value is True else "no" if value is False else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def phases_table(phases: Mapping[str, float]) -> Table:
    """Return a table of the seconds that each phase took."""
    total = sum(phases.values())
    columns = (
        TableColumn("phase"),
        TableColumn("seconds", is_number=True, bars=bars(list(phases.values()))),
        TableColumn("share", is_number=True),
    )
    rows = tuple(
        (name, f"{seconds:,.1f}", f"{seconds / total:.0%}" if total else "") for name, seconds in phases.items()
    )
    return Table("What took how long", columns, rows)
