"""The page of a report of shrinking: tables, and a bar for each layer."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from secateur.reports._html import Fact, tables_page
from secateur.reports._shrink_records import Latency, ModelSize, ShrinkProof, ShrunkDimension
from secateur.reports._shrink_rows import LayerBar, layer_bars
from secateur.reports._tables import Table, sentence


def shrink_page(
    lines: Sequence[str],
    before: ModelSize,
    after: ModelSize,
    proof: ShrinkProof | None,
    latency: Latency | None,
    dimensions: Sequence[ShrunkDimension],
    tables: Sequence[Table],
) -> str:
    """Return what shrinking did as one self-contained HTML page. The same values give the same page.

    Args:
        lines: of the summary.
        before: the whole model before.
        after: the whole model after.
        proof: that both are the same function, or None.
        latency: measured before and after, or None.
        dimensions: for each block of the model a bar is drawn.
        tables: to show below.
    """
    facts = [
        Fact("Parameters", f"{after.parameters:,}", f"of {before.parameters:,}"),
        Fact("Bytes", f"{after.nbytes:,}", f"of {before.nbytes:,}"),
    ]
    if before.macs is not None and after.macs is not None:
        facts.append(Fact("Multiply-adds", f"{after.macs:,}", f"of {before.macs:,}"))
    if latency is not None:
        shape = " x ".join(map(str, latency.shape))
        facts.append(Fact("Speed", f"{latency.ratio:.2f} times", f"measured at {shape}"))
    if proof is not None:
        facts.append(Fact("Proof", f"{proof.error:.2g}", f"relative error in {proof.dtype}"))
    bars = layer_bars(dimensions)
    lead = [f"{sentence(line)}." for line in lines]
    return tables_page("Shrinking report", lead, facts, tables, (_bars(bars),) if bars else ())


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
