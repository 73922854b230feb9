"""The pictures of report pages, as SVG and PNG within the page.

Charts come from matplotlib. The histogram of each layer is written directly, because matplotlib would need half a
minute and several megabytes for the layers of a large model. Colours are CSS variables: they follow the reader's theme.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from secateur.reports._records import Comparison, Histogram, LayerReport
from secateur.reports._rows import block_of
from secateur.reports._tables import usable

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def histogram_svg(histogram: Histogram) -> Markup:
    """Draw kept scores on top of pruned ones, bin by bin, with a line at the cut."""
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


def mask_png(layer: LayerReport) -> dict[str, Any]:
    """Draw the mask as a data URL, the more opaque the more is kept, and say at which size to show it."""
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


def layers_chart(layers: Sequence[LayerReport]) -> Markup:
    """Draw bars of sparsity and, if measured, of relative error, over the layers' numbers."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    measured = any(usable(layer.relative_error) is not None for layer in layers)

    def draw(figure: Figure) -> None:
        panels = [figure.add_subplot(1 + measured, 1, 1)]
        if measured:
            panels.append(figure.add_subplot(2, 1, 2, sharex=panels[0]))
        for panel in panels:
            _bands(panel, layers)
        sparsity = [usable(layer.sparsity) or 0.0 for layer in layers]
        _bars(panels[0], sparsity)
        panels[0].set_ylim(0, 1)
        panels[0].yaxis.set_major_formatter(PercentFormatter(1, symbol="\N{NO-BREAK SPACE}%"))
        panels[0].set_title("Sparsity", loc="left", fontsize=11, fontweight="bold")
        if measured:
            errors = [usable(layer.relative_error) or 0.0 for layer in layers]
            _bars(panels[1], errors)
            held_out = [usable(layer.held_out_error) for layer in layers]
            points = [(number, error) for number, error in enumerate(held_out, 1) if error is not None]
            if points:
                panels[1].plot(*zip(*points, strict=True), ".", color=_INK, markersize=5)
            panels[1].set_ylim(0, 1.08 * max(*errors, *(error for _, error in points), 0.0) or 1)
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
    for index, (_, members) in enumerate(groupby(layers, lambda layer: block_of(layer.name))):
        stop = start + len(list(members))
        if index % 2 and stop - start > 1:
            axes.axvspan(start + 0.5, stop + 0.5, color=_BAND, linewidth=0, zorder=0)
        start = stop


def comparison_chart(rows: Sequence[Comparison]) -> Markup | str:
    """Draw perplexity after pruning: a group for each target, a colour for each method, bars from the dense model."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    methods = list(dict.fromkeys(row.method for row in rows))
    groups = list(dict.fromkeys(row.target for row in rows))
    values = [value for row in rows for value in (row.before, row.after) if math.isfinite(value) and value > 0]
    if not values:
        return ""
    dense = next((row.before for row in rows if math.isfinite(row.before) and row.before > 0), min(values))
    # Few round numbers on the axis: decades alone where there are many, else 1, 2, 5 of each, or more.
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
    """Return what ``draw`` draws as an SVG element for a page, with colours as CSS variables and without unused ids."""
    import matplotlib.style
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        # The font is used for measuring only. The browser has fonts of its own for letters that it lacks.
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
