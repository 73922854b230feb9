"""Pruning reports and comparisons as web pages: one HTML string each, which loads nothing and runs nothing.

The words are in ``report.html.jinja``, which escapes whatever a report holds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import TYPE_CHECKING, Any

from secateur.reports._charts import comparison_chart, histogram_svg, layers_chart, mask_png
from secateur.reports._html import html_table, resource
from secateur.reports._records import Comparison, PruningRecord
from secateur.reports._rows import block_of, comparison_table, evaluation_table, pruned_table, skipped_table
from secateur.reports._tables import Table, figure, usable

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup


_MISSING = 'Report.to_html needs matplotlib and jinja2; install them with: pip install "secateur[report]"'
# Groups of layers are shown unfolded up to this many layers; beyond, the page would be a wall.
_UNFOLDED = 48


def report_page(report: PruningRecord) -> str:
    """Return a report as one self-contained HTML page. The same report gives the same page.

    Raises:
        ImportError: matplotlib or jinja2 is missing; the message names the extra to install.
    """
    return _render(title="Pruning report", comparison=None, report=report)


def comparison_page(
    title: str,
    intro: str,
    rows: Sequence[Comparison],
    report: PruningRecord | None = None,
    samples: Mapping[str, str] | None = None,
) -> str:
    """Return runs side by side as one self-contained HTML page, and below them the report of one.

    Args:
        title: of the page.
        intro: plain text, paragraphs separated by empty lines.
        rows: one for each run, in the order of the table.
        report: of the run to show in full.
        samples: plain texts to show, by heading, such as what a model wrote before and after.

    Raises:
        ImportError: matplotlib or jinja2 is missing; the message names the extra to install.
    """
    require_page_extra()
    comparison = {
        "intro": [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", intro) if paragraph.strip()],
        "rows": rows,
        "table": _markup(comparison_table(rows)),
        "methods": list(dict.fromkeys(row.method for row in rows)),
        "chart": comparison_chart(rows),
        "samples": dict(samples or {}),
    }
    return _render(title=title, comparison=comparison, report=report)


def require_page_extra() -> None:
    """Raise unless pages with pictures can be made. Asked before the work, whose page would otherwise fail at its end.

    Raises:
        ImportError: matplotlib or jinja2 is missing; the message names the extra to install.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error


def _render(title: str, comparison: Mapping[str, Any] | None, report: PruningRecord | None) -> str:
    require_page_extra()
    view = None if report is None else _view(report)
    return _template().render(
        title=title, comparison=comparison, report=report, view=view, style=_safe(resource("page.css"))
    )


def _markup(table: Table, anchor: str = "") -> Markup:
    return _safe(html_table(table, anchor))


def _safe(text: str) -> Markup:
    from markupsafe import Markup

    return Markup(text)  # escaped already


@cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        breakable=_breakable,
        duration=_duration,
        figure=figure,
        histogram=histogram_svg,
        percent=_percent,
        thumbnail=mask_png,
    )
    return environment.from_string(resource("report.html.jinja"))


def _view(report: PruningRecord) -> dict[str, Any]:
    """What the page shows of a report beyond its fields."""
    errors = [error for layer in report.layers if (error := usable(layer.relative_error)) is not None]
    numbered = list(enumerate(report.layers, 1))
    return {
        "chart": layers_chart(report.layers) if report.layers else "",
        "headline": _headline(report),
        "layers_table": _markup(pruned_table(report.layers), "layer-"),
        "skipped_table": _markup(skipped_table(report.skipped)),
        "evaluation_table": "" if report.evaluation is None else _markup(evaluation_table(report.evaluation)),
        "errors": errors,
        "held_out": any(usable(layer.held_out_error) is not None for layer in report.layers),
        "highest_error": max(errors, default=0.0),
        "groups": [
            {"name": name, "layers": list(members)}
            for name, members in groupby(numbered, lambda pair: block_of(pair[1].name))
        ],
        "unfolded": len(report.layers) <= _UNFOLDED,
        "pictures": any(layer.histogram is not None or layer.thumbnail for layer in report.layers),
        "recipe": _toml(report.recipe),
        "own_method": isinstance(report.recipe.get("method"), Mapping) and "repr" in report.recipe["method"],
    }


def _headline(report: PruningRecord) -> str:
    """The method and pattern in a line."""
    method: Any = report.recipe.get("method")
    refit = ""
    while isinstance(method, Mapping):
        if method.get("name") == "refit":
            method, refit = method.get("inner"), "+refit"
        else:
            method = method.get("name")
    patterns = ", ".join(dict.fromkeys(layer.pattern for layer in report.layers))
    parts = [f"method {method}{refit}" if method else "", f"pattern {patterns}" if patterns else ""]
    text = ", ".join(part for part in parts if part) or "nothing was pruned"
    return text[:1].upper() + text[1:]


def _toml(recipe: Mapping[str, Any]) -> str:
    import tomli_w

    try:
        return tomli_w.dumps(recipe)
    except (TypeError, AttributeError):  # a value that TOML has no word for, in a recipe written by hand
        return json.dumps(recipe, indent=1, default=str)


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}".replace("%", "\N{NO-BREAK SPACE}%")


def _duration(seconds: float) -> str:
    if not 60 <= seconds < math.inf:
        return f"{seconds:.2f}\N{NO-BREAK SPACE}s" if seconds < 10 else f"{seconds:.1f}\N{NO-BREAK SPACE}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _breakable(name: str) -> Markup:
    """A dotted name that may be wrapped after each dot."""
    from markupsafe import Markup

    return Markup(".<wbr>").join(name.split("."))
