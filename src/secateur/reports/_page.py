"""Reports as web pages: one HTML string each, that loads nothing and runs nothing.

The words are in ``report.html.jinja``, which escapes whatever a report holds; the pictures are made here. Charts come
from matplotlib; the histogram of each layer is written directly, because matplotlib would need half a minute and
several megabytes for the layers of a large model. Colours in pictures are CSS variables, so that they follow the
reader's theme.
"""

from __future__ import annotations

import base64
import io
import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Template
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from secateur.reports._pruning import Comparison, Histogram, LayerReport, Report

_MISSING = 'Report.to_html needs matplotlib and jinja2; install them with: pip install "secateur[report]"'
# Groups of layers are shown unfolded up to this many layers; beyond, the page would be a wall.
_UNFOLDED = 48
_THUMBNAIL_PIXELS = 112
# Colours that matplotlib draws with, and the CSS variable that takes the place of each in the SVG text.
_VARIABLES = {"#010101": "--ink", "#010102": "--soft", "#010103": "--line", "#010104": "--accent", "#010105": "--band"}
_INK, _SOFT, _LINE, _ACCENT, _BAND = _VARIABLES
_METHODS = tuple(f"#01020{index}" for index in range(8))
_VARIABLES |= {colour: f"--method-{index}" for index, colour in enumerate(_METHODS)}
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "secateur",
    "font.size": 11,
    "text.color": _INK,
    "text.parse_math": False,
    "axes.edgecolor": _LINE,
    "axes.labelcolor": _SOFT,
    "axes.labelsize": 11,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def report_page(report: Report) -> str:
    """Return a report as one self-contained HTML page. The same report gives the same page.

    Raises:
        ImportError: matplotlib or jinja2 is missing; the message names the extra to install.
    """
    return _render(title="Pruning report", comparison=None, report=report)


def comparison_page(
    title: str,
    intro: str,
    rows: Sequence[Comparison],
    report: Report | None = None,
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
    _require()
    keys = [row.target for row in rows]
    best: dict[str, float] = {}
    for key, row in zip(keys, rows, strict=True):
        if math.isfinite(row.after):
            best[key] = min(row.after, best.get(key, math.inf))
    comparison = {
        "intro": [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", intro) if paragraph.strip()],
        "rows": [
            (row, row.after == best.get(key), key != before)
            for key, before, row in zip(keys, [None, *keys], rows, strict=False)
        ],
        "methods": list(dict.fromkeys(row.method for row in rows)),
        "chart": _comparison_chart(rows),
        "samples": dict(samples or {}),
    }
    return _render(title=title, comparison=comparison, report=report)


def _require() -> None:
    try:
        import jinja2  # noqa: F401
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(_MISSING) from error


def _render(title: str, comparison: Mapping[str, Any] | None, report: Report | None) -> str:
    _require()
    view = None if report is None else _view(report)
    return _template().render(title=title, comparison=comparison, report=report, view=view)


@cache
def _template() -> Template:
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        breakable=_breakable,
        duration=_duration,
        figure=_figure,
        histogram=_histogram,
        percent=_percent,
        share=_share,
        thumbnail=_thumbnail,
    )
    return environment.from_string(
        resources.files("secateur.reports").joinpath("report.html.jinja").read_text(encoding="utf-8")
    )


def _view(report: Report) -> dict[str, Any]:
    """What the page shows of a report beyond its fields."""
    errors = [error for layer in report.layers if (error := _usable(layer.relative_error)) is not None]
    numbered = list(enumerate(report.layers, 1))
    return {
        "chart": _layers_chart(report.layers) if report.layers else "",
        "headline": _headline(report),
        "asked": any(abs(layer.asked - layer.sparsity) >= 5e-5 for layer in report.layers),
        "dead_inputs": any(layer.dead_inputs is not None for layer in report.layers),
        "notes": any(layer.notes or layer.tied_to for layer in report.layers),
        "errors": errors,
        "highest_error": max(errors, default=0.0),
        "groups": [
            {"name": name, "layers": list(members)} for name, members in groupby(numbered, lambda pair: _block(pair[1]))
        ],
        "unfolded": len(report.layers) <= _UNFOLDED,
        "pictures": any(layer.histogram is not None or layer.thumbnail for layer in report.layers),
        "recipe": _toml(report.recipe),
        "own_method": isinstance(report.recipe.get("method"), Mapping) and "repr" in report.recipe["method"],
    }


def _headline(report: Report) -> str:
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


def _block(layer: LayerReport) -> str:
    """The repeated block a layer belongs to: its name up to the first number that is followed by more."""
    parts = layer.name.split(".")
    for index, part in enumerate(parts[:-1]):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return ""


def _toml(recipe: Mapping[str, Any]) -> str:
    import tomli_w

    try:
        return tomli_w.dumps(recipe)
    except (TypeError, AttributeError):  # a value that TOML has no word for, in a recipe written by hand
        return json.dumps(recipe, indent=1, default=str)


# Numbers and names as text


def _usable(value: float | None) -> float | None:
    """The value if it is a finite number."""
    return value if value is not None and math.isfinite(value) else None


def _percent(fraction: float) -> str:
    return f"{fraction:.2%}".replace("%", "\N{NO-BREAK SPACE}%")


def _share(fraction: float) -> str:
    """A percentage without needless digits."""
    return f"{100 * fraction:.4g}\N{NO-BREAK SPACE}%"


def _figure(value: float | None) -> str:
    """Four significant digits; an en dash for what was not measured."""
    if value is None:
        return "\N{EN DASH}"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:#.4g}".removesuffix(".")


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


# Pictures


def _histogram(histogram: Histogram) -> Markup:
    """Kept scores stacked on pruned ones, bin by bin, with a line at the cut."""
    from markupsafe import Markup
    from matplotlib.ticker import MaxNLocator

    width, top, floor = 190.0, 4.0, 94.0
    edges = histogram.edges
    low, high = edges[0], edges[-1]
    if not high > low:  # rounded to one value, because all scores are about equal
        low, high = low - 0.5, low + 0.5
        edges = tuple(low + index / (len(edges) - 1) for index in range(len(edges)))
    total = [kept + pruned for kept, pruned in zip(histogram.kept, histogram.pruned, strict=True)]
    highest = max(*total, 1)

    def across(value: float) -> float:
        return min(max((value - low) / (high - low), 0.0), 1.0) * width

    def up(count: int) -> float:
        return floor - (floor - top) * count / highest

    def area(lower: Iterable[int], upper: Iterable[int]) -> str:
        """The columns between two counts for each bin, without the empty ones."""
        return "".join(
            f"M{across(left):.1f} {up(under):.1f}V{up(over):.1f}H{across(right):.1f}V{up(under):.1f}"
            for left, right, under, over in zip(edges, edges[1:], lower, upper, strict=False)
            if over > under
        )

    parts = [
        f'<path class="pruned" d="{area([0] * len(total), histogram.pruned)}"/>',
        f'<path class="kept" d="{area(histogram.pruned, total)}"/>',
        f'<path class="floor" d="M0 {floor:g}H{width:g}"/>',
    ]
    if histogram.cut is not None:
        parts.append(f'<path class="cut" d="M{across(histogram.cut):.1f} 0V{floor:g}"/>')
    for tick in MaxNLocator(4, steps=[1, 2, 5, 10]).tick_values(low, high):
        if low + 0.04 * (high - low) <= tick <= high - 0.04 * (high - low):
            label = f"{tick:g}".replace("-", "\N{MINUS SIGN}")
            parts.append(f'<text x="{across(tick):.1f}" y="109">{label}</text>')
    return Markup("".join(parts))


def _thumbnail(layer: LayerReport) -> dict[str, Any]:
    """A picture of the mask as a data URL, the more opaque the more is kept, and the size to show it at."""
    import numpy
    from matplotlib.image import imsave

    kept = numpy.array(layer.thumbnail, dtype=numpy.float64).clip(0, 100)
    pixels = numpy.empty((*kept.shape, 4), dtype=numpy.uint8)
    pixels[..., :3] = (47, 143, 110)
    pixels[..., 3] = (kept * 2.55).round()
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", metadata={"Software": "secateur"})
    longest = max(*layer.shape, 1)
    height, width = (round(_THUMBNAIL_PIXELS * max(side / longest, 0.25)) for side in layer.shape)
    return {
        "url": "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"),
        "rows": kept.shape[0],
        "columns": kept.shape[1],
        "height": height,
        "width": width,
    }


def _layers_chart(layers: Sequence[LayerReport]) -> Markup:
    """Bars of sparsity and, if measured, of relative error, over the layers' numbers."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    measured = any(_usable(layer.relative_error) is not None for layer in layers)

    def draw(figure: Figure) -> None:
        panels = [figure.add_subplot(1 + measured, 1, 1)]
        if measured:
            panels.append(figure.add_subplot(2, 1, 2, sharex=panels[0]))
        for panel in panels:
            _bands(panel, layers)
        sparsity = [_usable(layer.sparsity) or 0.0 for layer in layers]
        _bars(panels[0], sparsity)
        panels[0].set_ylim(0, 1)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1, symbol="\N{NO-BREAK SPACE}%"))
        panels[0].set_title("Sparsity", loc="left", fontsize=11, fontweight="bold")
        if measured:
            errors = [_usable(layer.relative_error) or 0.0 for layer in layers]
            _bars(panels[1], errors)
            panels[1].set_ylim(0, 1.08 * max(errors) or 1)
            panels[1].yaxis.set_major_locator(MaxNLocator(5))
            panels[1].set_title("Relative error of the output", loc="left", fontsize=11, fontweight="bold")
            panels[0].tick_params(labelbottom=False)
        panels[-1].set_xlim(0.4, max(len(layers), 8) + 0.6)
        panels[-1].xaxis.set_major_locator(MaxNLocator(12, integer=True))
        panels[-1].set_xlabel("layer, in the order pruned")

    return _svg(draw, (12.0, 5.2 if measured else 2.8), "Sparsity and relative error of each layer, as in the table")


def _bars(axes: Axes, values: Sequence[float]) -> None:
    """Bars at 1, 2, ...; a single outline where there are too many to tell apart."""
    if len(values) < 120:
        axes.bar(range(1, len(values) + 1), values, 0.8, color=_ACCENT)
    else:
        axes.stairs(values, [index + 0.5 for index in range(len(values) + 1)], fill=True, color=_ACCENT, linewidth=0)


def _bands(axes: Axes, layers: Sequence[LayerReport]) -> None:
    """Shade every other block."""
    start = 0
    for index, (_, members) in enumerate(groupby(layers, _block)):
        stop = start + len(list(members))
        if index % 2 and stop - start > 1:
            axes.axvspan(start + 0.5, stop + 0.5, color=_BAND, linewidth=0, zorder=0)
        start = stop


def _comparison_chart(rows: Sequence[Comparison]) -> Markup | str:
    """Perplexity after, one group a target, one colour a method; bars start at the dense model, the axis is log."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    methods = list(dict.fromkeys(row.method for row in rows))
    groups = list(dict.fromkeys(row.target for row in rows))
    values = [value for row in rows for value in (row.before, row.after) if math.isfinite(value) and value > 0]
    if not values:
        return ""
    dense = next((row.before for row in rows if math.isfinite(row.before) and row.before > 0), min(values))
    # Few round numbers on the axis: 1, 2, 5 of each decade over two decades, decades alone over more.
    span = math.log10(max(values) / min(values))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        thickness = 0.8 / len(methods)
        for row in rows:
            if not (math.isfinite(row.after) and row.after > 0):
                continue
            place = methods.index(row.method)
            middle = groups.index(row.target) + (place - (len(methods) - 1) / 2) * thickness
            colour = _METHODS[place % len(_METHODS)]
            axes.bar(middle, row.after - dense, thickness * 0.86, bottom=dense, color=colour)
        axes.axhline(dense, color=_INK, linewidth=1.4, linestyle=(0, (4, 3)))
        axes.set_yscale("log")
        axes.set_ylim(min(values) / 10 ** (0.06 * span + 0.01), max(values) * 10 ** (0.08 * span + 0.02))
        axes.yaxis.set_major_locator(LogLocator(10, subs=_ticks(span)))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda value, _: f"{value:,.0f}" if 1e3 <= value < 1e9 else f"{value:g}")
        )
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylabel("perplexity after pruning")
        axes.set_xlim(-0.55, len(groups) - 0.45)
        axes.set_xticks(range(len(groups)), groups)
        for label in axes.get_xticklabels():
            label.set_color(_INK)

    return _svg(draw, (12.0, 4.6), "Perplexity after pruning by pattern and method, as in the table")


def _ticks(decades: float) -> tuple[float, ...]:
    if decades > 3:
        return (1.0,)
    return (1.0, 2.0, 5.0) if decades > 0.6 else (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], label: str) -> Markup:
    """What ``draw`` draws, as an SVG element for a page: no ids but those it refers to, colours as CSS variables."""
    import matplotlib.style
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # The font here only measures; a letter that it lacks is no fault, the browser has its own.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    body = re.sub(r"<metadata>.*?</metadata>", "", text[text.index(">", text.index("<svg")) + 1 :], flags=re.DOTALL)
    body = re.sub(r' id="[a-z]+[._0-9a-z]*_\d+"', "", body)
    body = re.sub(r"\n\s*", "\n", re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)).strip()
    for colour, variable in _VARIABLES.items():
        body = body.replace(colour, f"var({variable})")
    box = f"0 0 {size[0] * 72:g} {size[1] * 72:g}"
    return Markup(f'<svg class="chart" viewBox="{box}" role="img" aria-label="{escape(label)}">\n{body}')
