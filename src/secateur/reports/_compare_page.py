"""The page of a comparison: the picture of speed and accuracy, and the tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from secateur.reports._compare_picture import NARROW, WIDE, picture
from secateur.reports._compare_records import WayResult, shape_text
from secateur.reports._compare_rows import View, megabytes
from secateur.reports._html import Fact, tables_page
from secateur.reports._tables import Table, figure, sentence

# Points and frontier of a view.
Shown = tuple[Mapping[int, tuple[float, float]], Sequence[int]]


def compare_page(
    lines: Sequence[str],
    ways: Sequence[WayResult],
    reference: int,
    models: tuple[str, str],
    metric: tuple[str, bool],
    views: Mapping[View, Shown],
    tables: Sequence[Table],
) -> str:
    """Return a comparison as one self-contained HTML page. It loads nothing and runs nothing: CSS does the rest.

    Args:
        lines: of the summary.
        ways: all of them.
        reference: number of the way that the others are compared with.
        models: names of the given and of the dense model; the second is empty if there is one model.
        metric: name of the figure, and whether higher is better.
        views: for each view, first that which is shown first, the points and the numbers of the ways on the frontier.
        tables: to show below.
    """
    lead = [f"{sentence(line).rstrip('.')}." for line in lines]
    shown = {view: found for view, found in views.items() if found[0]}
    pictures = (_figure(ways, reference, models, metric, shown),) if shown else ()
    return tables_page(f"Ways to run {models[0]}", lead, _facts(ways, metric, views), tables, pictures)


def _facts(ways: Sequence[WayResult], metric: tuple[str, bool], views: Mapping[View, Shown]) -> list[Fact]:
    """The ends of the frontier, and what takes least room."""
    view, (points, frontier) = next(iter(views.items()), (None, ({}, ())))
    if not frontier:
        return []
    name, found = metric[0].replace("_", " "), []
    fastest, best = frontier[-1], frontier[0]
    found.append(
        Fact(
            "Fastest" if view is None else f"Fastest at {shape_text(view)}",
            f"{points[fastest][0]:.2f} times",
            f"{ways[fastest].name}; {name} {figure(points[fastest][1])}",
        )
    )
    found.append(
        Fact(f"Best {name}", figure(points[best][1]), f"{ways[best].name}; {points[best][0]:.2f} times as fast")
    )
    sizes = {number: ways[number].nbytes for number in points}
    memory = {number: ways[number].memory for number in points}
    for title, known in (("Smallest on disk", sizes), ("Least memory", memory)):
        measured = {number: nbytes for number, nbytes in known.items() if nbytes is not None}
        if measured:
            least = min(measured, key=lambda number: measured[number])
            found.append(Fact(title, f"{megabytes(measured[least])} MB", ways[least].name))
    return found


def _figure(
    ways: Sequence[WayResult],
    reference: int,
    models: tuple[str, str],
    metric: tuple[str, bool],
    views: Mapping[View, Shown],
) -> str:
    """A picture for each view, of which a reader chooses one; on a narrow screen another drawing of it."""
    choices, panels = [], []
    for number, (view, (points, frontier)) in enumerate(views.items()):
        checked = ' checked="checked"' if number == 0 else ""
        choices.append(f'<input type="radio" name="view" id="view-{number}"{checked}/>')
        drawn = "\n".join(picture(canvas, ways, view, points, frontier, reference, metric) for canvas in (WIDE, NARROW))
        panels.append(f'<div class="panel" id="panel-{number}">\n{drawn}\n</div>')
    names = "".join(
        f'<label for="view-{number}">{escape(shape_text(view))}</label>' for number, view in enumerate(views)
    )
    rules = "\n".join(
        f"#view-{number}:checked ~ #panel-{number} {{ display: block; }}\n"
        f'#view-{number}:checked ~ .views label[for="view-{number}"] '
        "{ color: var(--paper); background: var(--ink); }\n"
        f'#view-{number}:focus-visible ~ .views label[for="view-{number}"] {{ outline: 2px solid var(--accent); }}'
        for number in range(len(views))
    )
    keys = "".join(
        f'<span class="key"><i class="{kind}"></i>{escape(text)}</span>'
        for kind, text in (("ours", models[0]), ("dense-model", f"{models[1]} (dense)" if models[1] else ""))
        if text
    )
    chooser = f'<div class="views" role="presentation">{names}</div>' if len(views) > 1 else ""
    return (
        f'<figure class="frontier">\n<style>\n{rules}\n</style>\n{"".join(choices)}\n{chooser}\n'
        f'<p class="keys">{keys}</p>\n' + "\n".join(panels) + '\n<figcaption class="caption">Filled points are on the '
        "frontier: no other way is both faster and at least as good. In the shaded area some other way is. Lines "
        "through points are the quartiles of their times. Point at one, or choose it with the keyboard, for all its "
        "figures.</figcaption>\n</figure>"
    )
