"""The page of a report of shrinking: tables, and a bar for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from secateur.reports._html import Fact, tables_page
from secateur.reports._shrink_rows import LayerBar, layer_bars
from secateur.reports._shrinking import ShrinkReport
from secateur.reports._tables import sentence


def shrink_page(report: ShrinkReport) -> str:
    """Return a report of shrinking as one self-contained HTML page. The same report gives the same page."""
    before, after = report.before, report.after
    facts = [
        Fact("Parameters", f"{after.parameters:,}", f"of {before.parameters:,}"),
        Fact("Bytes", f"{after.nbytes:,}", f"of {before.nbytes:,}"),
    ]
    if before.macs is not None and after.macs is not None:
        facts.append(Fact("Multiply-adds", f"{after.macs:,}", f"of {before.macs:,}"))
    if report.latency is not None:
        shape = " x ".join(map(str, report.latency.shape))
        facts.append(Fact("Speed", f"{report.latency.ratio:.2f} times", f"measured at {shape}"))
    if report.proof is not None:
        facts.append(Fact("Proof", f"{report.proof.error:.2g}", f"relative error in {report.proof.dtype}"))
    lead = [f"{sentence(line)}." for line in str(report).split("\n")]
    bars = layer_bars(report.dimensions)
    return tables_page("Shrinking report", lead, facts, report.tables, (_bars(bars),) if bars else ())


def _bars(layers: Sequence[LayerBar]) -> str:
    """A table with a row for each block and a column for each kind, with what stayed and what went as a bar."""
    kinds = list(dict.fromkeys(kind for layer in layers for kind, _, _ in layer.parts))
    heads = "".join(f'<th scope="col">{escape(kind.replace("_", " "))}</th>' for kind in kinds or ["block"])
    rows = []
    for layer in layers:
        if layer.is_gone:
            cells = f'<td colspan="{max(len(kinds), 1)}" class="soft">gone{_bar(0, 1)}</td>'
        elif not kinds:
            cells = f"<td>kept{_bar(1, 1)}</td>"
        else:
            cells = "".join(f"<td>{_parts(layer, kind)}</td>" for kind in kinds)
        name = escape(layer.name).replace(".", ".<wbr>")
        rows.append(f'<tr><th scope="row" class="name">{name}</th>{cells}</tr>')
    tall = " tall" if len(rows) > 48 else ""
    return (
        '<p class="keys"><span class="key"><i class="kept"></i>kept</span>'
        '<span class="key"><i class="pruned"></i>gone</span></p>\n'
        f'<div class="scroll{tall}" role="region" tabindex="0" aria-label="Layers, kept and gone">\n<table>\n'
        f'<caption>Layers, kept and gone</caption>\n<thead><tr><th scope="col">layer</th>{heads}</tr></thead>\n'
        "<tbody>\n" + "\n".join(rows) + "\n</tbody>\n</table>\n</div>"
    )


def _parts(layer: LayerBar, kind: str) -> str:
    found = [(after, before) for name, after, before in layer.parts if name == kind]
    return "".join(f"<div>{after:,} of {before:,}{_bar(after, before)}</div>" for after, before in found)


def _bar(after: int, before: int) -> str:
    width = 100 * after / before if before else 0.0
    return f'<span class="meter split"><i style="width:{width:.1f}%"></i></span>'
