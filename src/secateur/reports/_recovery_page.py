"""The tables and the page of a report of a recovery, with the curve of the held-out loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from secateur.reports._html import Fact, tables_page
from secateur.reports._recovery_records import CurvePoint
from secateur.reports._tables import Table, TableColumn, figure, sentence

_WIDTH, _HEIGHT = 720, 260  # of the picture, in its own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 36  # margins
_MOST_ROWS = 24


def duration(seconds: float) -> str:
    """Return a time as text: ``"12.3 s"``, or ``"4 min 31 s"`` from two minutes on."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s"


def curve_table(curve: Sequence[CurvePoint], best_step: int) -> Table:
    """Return a table of the held-out loss over time. The best state stands out.

    Of a long curve it has some points, the first, the best and the last among them.
    """
    columns = (
        TableColumn("step"),
        *(TableColumn(name, is_number=True) for name in ("time", "held-out loss", "training loss", "learning rate")),
        TableColumn("part"),
    )
    shown = _some(curve, best_step)
    rows = tuple(
        (
            f"{point.step:,}",
            duration(point.seconds),
            figure(point.held_out),
            figure(point.train_loss),
            f"{point.learning_rate:.2g}" if point.learning_rate else "",
            point.part,
        )
        for point in shown
    )
    best = tuple((number, 2) for number, point in enumerate(shown) if point.step == best_step)
    left = len(curve) - len(shown)
    notes = (f"{left:,} of {len(curve):,} points are left out.",) if left else ()
    return Table("Held-out loss", columns, rows, notes, strong=best)


def _some(curve: Sequence[CurvePoint], best_step: int) -> list[CurvePoint]:
    if len(curve) <= _MOST_ROWS:
        return list(curve)
    chosen = {round(number * (len(curve) - 1) / (_MOST_ROWS - 2)) for number in range(_MOST_ROWS - 1)}
    chosen |= {number for number, point in enumerate(curve) if point.step == best_step}
    return [curve[number] for number in sorted(chosen)]


def trained_table(blocks: Mapping[str, str]) -> Table:
    """Return a table that says from which block of the teacher each block learned."""
    columns = (TableColumn("block"), TableColumn("learned from"))
    return Table("Blocks of the teacher", columns, tuple(blocks.items()))


def recovery_page(
    lines: Sequence[str],
    losses: tuple[float, float, float],
    curve: Sequence[CurvePoint],
    best_step: int,
    seconds: float,
    tables: Sequence[Table],
) -> str:
    """Return what a recovery did as one self-contained HTML page. The same values give the same page.

    Args:
        lines: of the summary.
        losses: on held-out batches before and after, and the part of it that went.
        curve: of the held-out loss.
        best_step: after how many steps the best state was reached.
        seconds: working time.
        tables: to show below.
    """
    start, best, gain = losses
    facts = [
        Fact("Held-out loss", figure(best), f"{figure(start)} before"),
        Fact("Gained", f"{gain:.1%}", "of the held-out loss"),
        Fact("Time", duration(seconds), f"best after step {best_step:,}"),
    ]
    picture = _picture(curve, best_step)
    lead = [f"{sentence(line)}." for line in lines]
    return tables_page("Recovery report", lead, facts, tables, (picture,) if picture else ())


def _picture(curve: Sequence[CurvePoint], best_step: int) -> str:
    """The held-out loss over working time, part by part, as SVG; empty where there are not two points."""
    points = [point for point in curve if math.isfinite(point.held_out) and math.isfinite(point.seconds)]
    if len(points) < 2:
        return ""
    end = max(point.seconds for point in points) or 1.0
    low, high = min(point.held_out for point in points), max(point.held_out for point in points)
    low = min(low, 0.0) if low < high / 2 else low  # the axis begins at zero unless that hides the curve
    high = high if high > low else low + (abs(low) or 1.0)

    def at(point: CurvePoint) -> tuple[float, float]:
        across = _LEFT + (_WIDTH - _LEFT - _RIGHT) * point.seconds / end
        down = _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - point.held_out) / (high - low)
        return round(across, 1), round(down, 1)

    shapes = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        down = round(_TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - share), 1)
        shapes.append(f'<path d="M{_LEFT} {down}H{_WIDTH - _RIGHT}" stroke="var(--line)"/>')
        shapes.append(_text(_LEFT - 8, down + 4, figure(low + share * (high - low)), "end"))
        across = round(_LEFT + (_WIDTH - _LEFT - _RIGHT) * share, 1)
        anchor = "start" if share == 0 else "end" if share == 1 else "middle"
        shapes.append(_text(across, _HEIGHT - 14, duration(share * end), anchor))
    for part in dict.fromkeys(point.part for point in points):
        line = " ".join(f"{x},{y}" for x, y in (at(point) for point in points if point.part == part))
        shapes.append(f'<polyline points="{line}" fill="none" stroke="var(--accent)" stroke-width="2"/>')
    for point in points:
        x, y = at(point)
        title = f"step {point.step:,}: {figure(point.held_out)}" + (f", {point.part}" if point.part else "")
        size = 5 if point.step == best_step else 2.5
        shapes.append(
            f'<circle cx="{x}" cy="{y}" r="{size}" fill="var(--accent)"><title>{escape(title)}</title></circle>'
        )
    drawn = "\n".join(shapes)
    return (
        '<figure>\n<div class="scroll" role="region" tabindex="0" aria-label="Held-out loss over time">\n'
        f'<svg class="chart" role="img" viewBox="0 0 {_WIDTH} {_HEIGHT}" xmlns="http://www.w3.org/2000/svg">\n'
        f"<title>Held-out loss over working time</title>\n{drawn}\n</svg>\n</div>\n"
        '<figcaption class="caption">Held-out loss over working time. The large dot is the state that was kept.'
        "</figcaption>\n</figure>"
    )


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="11" fill="var(--soft)">{escape(text)}</text>'
