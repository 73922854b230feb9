"""The page of a plan: what was measured and what was predicted over speed, what happens to each part, and tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from secateur.reports._drawing import Canvas, path, text_at, ticks, time_ticks, tip
from secateur.reports._html import Fact, tables_page
from secateur.reports._label_places import Box
from secateur.reports._plan_records import PlannedPart, PlanPoint
from secateur.reports._tables import Table, figure, sentence

_WIDE = Canvas("wide", 1040, 420, 64, 13, True)
_NARROW = Canvas("slim", 358, 330, 50, 12, False)
_ROOM = 1.08  # beyond the slowest and the fastest point
_LETTER = 6.8  # width of a letter of a label
_HIGHEST = 4.0  # times the loss of the chosen model, above which a predicted curve is not drawn: it would flatten all


@dataclass(frozen=True)
class PageFacts:
    """What a page shows besides its tables.

    Args:
        model: its name.
        lines: of the summary.
        dense: the dense model in PyTorch.
        alternatives: the dense model in other engines.
        candidates: models that were made on the way.
        frontier: the predicted curve.
        chosen: what was decided; None if nothing was.
        is_measured: whether the chosen one was made.
        parts: what happens to each.
        metric: name of the figure.
        measure: name of the loss.
        needed: times as fast that are asked for; None if that is not asked.
        allowed: the worst figure that is allowed; None without a limit.
        is_missed: what was made does not reach what was asked.
    """

    model: str
    lines: Sequence[str]
    dense: PlanPoint
    alternatives: Sequence[PlanPoint]
    candidates: Sequence[PlanPoint]
    frontier: Sequence[PlanPoint]
    chosen: PlanPoint | None
    is_measured: bool
    parts: Sequence[PlannedPart]
    metric: str
    measure: str
    needed: float | None
    allowed: float | None
    is_missed: bool


def plan_page(facts: PageFacts, tables: Sequence[Table]) -> str:
    """Return a plan as one self-contained HTML page. It loads nothing and runs nothing.

    Args:
        facts: to show.
        tables: below.
    """
    lead = [f"{sentence(line).rstrip('.')}." for line in facts.lines]
    chosen, tiles = facts.chosen, []
    if chosen is not None:
        how = "measured" if facts.is_measured else "predicted"
        how += "; target missed" if facts.is_missed else ""
        tiles.append(Fact(f"Speed, {how}", f"{chosen.speedup:.2f} times", f"{chosen.title}; {chosen.way}"))
        if chosen.figure is not None:
            dense = f"dense model {figure(facts.dense.figure)}" if facts.dense.figure is not None else ""
            tiles.append(Fact(sentence(facts.metric), figure(chosen.figure), dense))
        tiles.append(Fact("Weights", f"{chosen.nbytes / 1e6:.1f} MB", f"dense model {facts.dense.nbytes / 1e6:.1f} MB"))
    measured = [point for point in (facts.dense, *facts.alternatives, *facts.candidates) if point.figure is not None]
    if chosen is not None and chosen.figure is not None:
        measured.append(chosen)
    panels = []
    if len(measured) > 1:
        panels.append(_panel(facts, measured, [], facts.metric.replace("_", " "), facts.allowed))
    curve = [point for point in facts.frontier if point.loss is not None]
    if curve:
        known = [point for point in facts.alternatives if point.loss is not None]
        known += [chosen] if chosen is not None and chosen.loss is not None else []
        panels.append(_panel(facts, known, curve, f"{facts.measure}, predicted", None))
    pictures = [f'<figure class="frontier">{"".join(panels)}</figure>'] if panels else []
    if facts.parts:
        pictures.append(_strip(facts.parts))
    return tables_page(f"A plan for {facts.model}", lead, tiles, tables, pictures)


def _panel(
    facts: PageFacts, points: Sequence[PlanPoint], curve: Sequence[PlanPoint], name: str, allowed: float | None
) -> str:
    """One value over speed, drawn for a wide and for a narrow window."""
    return (
        '<div class="panel" style="display: block">'
        + "".join(_drawn(canvas, facts, points, curve, name, allowed) for canvas in (_WIDE, _NARROW))
        + "</div>"
    )


def _value(point: PlanPoint, is_loss: bool) -> float:
    found = point.loss if is_loss else point.figure
    return math.nan if found is None else found


def _drawn(
    canvas: Canvas,
    facts: PageFacts,
    points: Sequence[PlanPoint],
    curve: Sequence[PlanPoint],
    name: str,
    allowed: float | None,
) -> str:
    is_loss = bool(curve)
    left, top, right, bottom = canvas.area
    highest = math.inf
    if is_loss:
        chosen = facts.chosen.loss if facts.chosen is not None and facts.chosen.loss else None
        highest = _HIGHEST * (chosen or max(_value(point, True) for point in curve))
        curve = [point for point in curve if _value(point, True) <= highest]
        points = [point for point in points if _value(point, True) <= highest]
    shown = [*points, *curve]
    # Both panels have one horizontal axis.
    alike = [facts.dense, *facts.alternatives, *facts.candidates, *facts.frontier]
    if facts.chosen is not None and facts.chosen.loss:
        alike = [point for point in alike if (point.loss or 0.0) <= _HIGHEST * facts.chosen.loss]
    speeds = [point.speedup for point in (*alike, *shown)] + [1.0] + ([facts.needed] if facts.needed else [])
    values = [_value(point, is_loss) for point in shown] + ([allowed] if allowed is not None else [])
    values += [0.0] if is_loss else []
    low, high = min(speeds) / _ROOM, max(speeds) * _ROOM
    span = (max(values) - min(values)) or abs(max(values)) * 0.02 or 1.0
    floor, ceiling = min(values) - 0.08 * span, max(values) + 0.12 * span

    def at(speed: float, value: float) -> tuple[float, float]:
        across = math.log(speed / low) / math.log(high / low)
        along = (value - floor) / (ceiling - floor)
        return round(left + across * (right - left), 1), round(bottom - along * (bottom - top), 1)

    parts = [
        f'<svg class="{canvas.name}" role="img" aria-label="{escape(name, quote=True)} over times as fast" '
        f'viewBox="0 0 {canvas.width} {canvas.height}" xmlns="http://www.w3.org/2000/svg">'
    ]
    for tick in time_ticks(low, high, most=9 if canvas.labels_all else 5):
        x, _ = at(tick, floor)
        parts.append(f'<path class="{"one" if tick == 1 else "grid"}" d="M{x:g} {top:g}V{bottom:g}"/>')
        parts.append(text_at(x, bottom + 17, f"{tick:g}\N{MULTIPLICATION SIGN}", "tick", "middle"))
    for value in ticks(floor, ceiling):
        _, y = at(low * _ROOM, value)
        parts.append(f'<path class="grid" d="M{left:g} {y:g}H{right:g}"/>')
        parts.append(text_at(left - 8, y + 4, f"{value:,g}", "tick", "end"))
    across = "times as fast as PyTorch with the dense model" if canvas.labels_all else "times as fast as PyTorch, dense"
    parts.append(text_at(right, bottom + 36, f"{across} \N{RIGHTWARDS ARROW}", "title", "end"))
    parts.append(text_at(4, 16, name, "title", "start"))
    if facts.needed:
        x, _ = at(facts.needed, floor)
        parts.append(f'<path class="edge" d="M{x:g} {top:g}V{bottom:g}"/>')
        parts.append(text_at(x - 6, top + 12, "target", "title", "end"))
    if allowed is not None:
        _, y = at(low * _ROOM, allowed)
        parts.append(f'<path class="edge" d="M{left:g} {y:g}H{right:g}"/>')
        parts.append(text_at(left + 6, y - 6, "allowed", "title", "start"))
    parts.append(path("edge", [at(point.speedup, _value(point, True)) for point in curve]))
    taken: list[Box] = []
    for point in sorted(points, key=lambda one: one is not facts.chosen):
        if point is facts.chosen or canvas.labels_all:
            label = point.way if point.title == "dense" else point.title
            parts.append(_label(label, at(point.speedup, _value(point, is_loss)), (left, right), taken))
    for point in points:
        is_chosen = point is facts.chosen
        x, y = at(point.speedup, _value(point, is_loss))
        kind = "ours on" if is_chosen else "ours" if point in facts.candidates else "dense"
        parts.append(f'<g class="{kind}"><circle class="dot" cx="{x:g}" cy="{y:g}" r="{8 if is_chosen else 5}"/></g>')
    for point in shown:
        value = _value(point, is_loss)
        lines = [point.title, point.way, f"{point.speedup:.2f} times as fast", f"{name} {figure(value)}"]
        parts.append(tip(canvas, lines, at(point.speedup, value), "way ours", 9))
    return "\n".join(part for part in [*parts, "</svg>"] if part)


def _label(text: str, place: tuple[float, float], ends: tuple[float, float], taken: list[Box]) -> str:
    """A label beside its point where no other one is, or a line above or below; else none: a pointer shows it."""
    x, y = place
    width = len(text) * _LETTER
    for side in (1, -1) if x < sum(ends) / 2 else (-1, 1):
        begin = x + 11 if side > 0 else x - 11 - width
        if begin < ends[0] - 40 or begin + width > ends[1] + 10:
            continue
        for down in (0, -15, 15, -30, 30):
            box = (begin, y + down - 7, begin + width, y + down + 7)
            if all(box[2] < b[0] or b[2] < box[0] or box[3] < b[1] or b[3] < box[1] for b in taken):
                taken.append(box)
                anchor = "start" if side > 0 else "end"
                return text_at(x + 11 * side, y + down + 4, text, "label", anchor)
    return ""


def _strip(parts: Sequence[PlannedPart]) -> str:
    """What stays of each part, as bars."""
    kinds = list(dict.fromkeys(kind for part in parts for kind in part.kept))
    has_zeros = any(part.pattern for part in parts)
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in ["part", *kinds, *["weights"] * has_zeros])
    rows = []
    for part in parts:
        cells = [f'<th scope="row" class="name">{escape(part.name).replace(".", ".<wbr>")}</th>']
        if part.is_removed:
            cells.append(f'<td colspan="{len(kinds) + has_zeros or 1}" class="soft">removed</td>')
        else:
            for kind in kinds:
                cells.append(_bar(*part.kept[kind]) if kind in part.kept else "<td></td>")
            if has_zeros:
                share = 1 - part.sparsity if part.pattern else 1.0
                text = f"{share:.0%}" + (f" ({part.pattern})" if part.pattern else "")
                cells.append(f"<td>{escape(text)}{_meter(share)}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<h2>What stays of each part</h2>\n<div class="scroll"><table><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _bar(stay: int, of: int) -> str:
    return f"<td>{stay:,} of {of:,}{_meter(stay / max(of, 1))}</td>"


def _meter(share: float) -> str:
    return f'<span class="meter"><i style="width:{100 * share:.1f}%"></i></span>'
