"""The tables of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur.reports._compare_records import WayResult, WayTiming, shape_text
from secateur.reports._tables import Table, TableColumn, figure

View = tuple[int, ...] | None  # a shape; None for all together


def megabytes(nbytes: int | None) -> str:
    """Return bytes as megabytes with three digits; empty text for what was not measured."""
    if nbytes is None:
        return ""
    value = nbytes / 1e6
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def milliseconds(timing: WayTiming) -> str:
    """Return a time with its spread: ``"12.3 (12.1 to 12.9)"``; with a tilde before it where it is noisy."""
    low, middle, high = (f"{value:.3g}" if value < 1000 else f"{value:,.0f}" for value in timing.milliseconds)
    return f"{'~' if timing.noisy else ''}{middle} ({low} to {high})"


def ways_table(
    ways: Sequence[WayResult],
    shapes: Sequence[tuple[int, ...]],
    reference: int,
    metric: str,
    marks: Mapping[View, Sequence[int]],
) -> Table:
    """Return a table of the ways that were run. What is on a frontier stands out.

    Args:
        ways: all of them.
        shapes: of the inputs.
        reference: number of the way that the others are compared with.
        metric: the first figure of every way.
        marks: for each view the numbers of the ways that no other one beats.
    """
    run = [(number, way) for number, way in enumerate(ways) if not way.absence]
    views: list[View] = [None, *shapes] if len(shapes) > 1 else list(shapes)
    columns = (
        TableColumn("way"),
        TableColumn("model", is_name=True),
        *(TableColumn(shape_text(view), is_number=True) for view in views),
        TableColumn(metric.replace("_", " "), is_number=True),
        TableColumn("disk, MB", is_number=True),
        TableColumn("memory, MB", is_number=True),
        TableColumn("frontier", is_name=True),
        TableColumn("notes", is_note=True),
    )
    rows, strong = [], []
    for place, (number, way) in enumerate(run):
        noisy = {timing.shape for timing in way.timings if timing.noisy}
        speeds = [
            "" if speed is None else f"{'~' if view in noisy else ''}{speed:.2f} x"
            for view in views
            for speed in [way.times_at(view, shapes)]
        ]
        on = [index for index, view in enumerate(views) if number in marks.get(view, ())]
        rows.append(
            (
                way.title,
                way.model,
                *speeds,
                figure(way.quality),
                megabytes(way.nbytes),
                megabytes(way.memory),
                ("everywhere" if len(on) == len(views) else f"{len(on)} of {len(views)}") if on else "",
                "; ".join(way.notes),
            )
        )
        strong += [(place, 2 + index) for index in on]
    notes = []
    if run:
        notes.append(
            f"Times as fast as {ways[reference].name}, by input shape: the median of the ratios within rounds. What "
            "stands out is on the frontier: no other way is both faster and at least as good."
        )
    if any(way.memory is not None for _, way in run):
        notes.append(
            "In memory: what a process of its own gains by loading and running the model; libraries do not count."
        )
    return Table("Ways to run the model", columns, tuple(rows), (*notes, *_noise(ways)), _sections(run), tuple(strong))


def milliseconds_table(ways: Sequence[WayResult], shapes: Sequence[tuple[int, ...]]) -> Table:
    """Return a table of the milliseconds of each way by input shape, with the quartiles.

    Args:
        ways: all of them.
        shapes: of the inputs.
    """
    run = [(number, way) for number, way in enumerate(ways) if not way.absence]
    columns = (
        TableColumn("way"),
        TableColumn("model", is_name=True),
        *(TableColumn(shape_text(shape), is_number=True) for shape in shapes),
    )
    rows = []
    for _, way in run:
        timings = {timing.shape: timing for timing in way.timings}
        cells = (milliseconds(timings[shape]) if shape in timings else "" for shape in shapes)
        rows.append((way.title, way.model, *cells))
    notes = ("The median, and in brackets the quartiles.",) if run else ()
    return Table("Milliseconds", columns, tuple(rows), (*notes, *_noise(ways)), _sections(run))


def _sections(run: Sequence[tuple[int, WayResult]]) -> tuple[int, ...]:
    """Where another model begins."""
    return tuple(place for place in range(1, len(run)) if run[place - 1][1].model != run[place][1].model)


def _noise(ways: Sequence[WayResult]) -> tuple[str, ...]:
    noisy = any(timing.noisy for way in ways for timing in way.timings)
    return ("~ The machine was busy with something else while this was measured.",) if noisy else ()


def figures_of_ways_table(ways: Sequence[WayResult]) -> Table:
    """Return a table of all figures of each way, where there is more than one."""
    names = list(dict.fromkeys((found.metric, found.file) for way in ways for found in way.figures))
    files = {file for _, file in names}
    columns = (
        TableColumn("way"),
        TableColumn("model", is_name=True),
        *(
            TableColumn(metric.replace("_", " ") + (f", {file}" if len(files) > 1 else ""), is_number=True)
            for metric, file in names
        ),
    )
    rows = []
    for way in ways if len(names) > 1 else ():
        known = {(found.metric, found.file): found.value for found in way.figures}
        if known:
            rows.append((way.title, way.model, *(figure(known.get(name)) for name in names)))
    return Table("All figures", columns, tuple(rows))


def absent_table(ways: Sequence[WayResult]) -> Table:
    """Return a table of the ways that could not be run, and why. Models that share a reason share a row."""
    columns = (TableColumn("way"), TableColumn("model", is_name=True), TableColumn("reason"))
    models: dict[tuple[str, str], list[str]] = {}
    for way in ways:
        if way.absence:
            models.setdefault((way.title, way.absence), []).append(way.model)
    rows = tuple((title, ", ".join(names), reason) for (title, reason), names in models.items())
    return Table("Not run", columns, rows)
