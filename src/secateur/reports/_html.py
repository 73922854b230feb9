"""Tables as HTML, and pages of tables. Nothing beyond the standard library is needed, and all text is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import metadata, resources
from string import Template

from secateur.reports._tables import Table

# A longer table scrolls within the page.
_TALL = 48


@dataclass(frozen=True)
class Fact:
    """One figure at the top of a page: what it is, its value, and what it is to be compared with."""

    label: str
    value: str
    aside: str = ""


def tables_page(
    title: str, lead: Sequence[str], facts: Sequence[Fact], tables: Sequence[Table], pictures: Sequence[str] = ()
) -> str:
    """Return tables as one self-contained HTML page, which loads nothing and runs nothing.

    Args:
        title: of the page.
        lead: paragraphs below the title.
        facts: figures that stand out, above the tables.
        tables: to show; those without rows are left out.
        pictures: HTML that stands above the tables, escaped already.
    """
    sections = [*pictures, *(html_table(table) for table in tables if table.rows)]
    tiles = "\n".join(
        f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.value)}</dd>"
        + (f'<dd class="aside">{escape(fact.aside)}</dd>' if fact.aside else "")
        + "</div>"
        for fact in facts
    )
    return Template(resource("tables.html")).substitute(
        title=escape(title),
        style=resource("page.css"),
        lead="\n".join(f'<p class="lead">{escape(paragraph)}</p>' for paragraph in lead),
        facts=f'<dl class="tiles">\n{tiles}\n</dl>' if facts else "",
        tables="\n".join(f"<section>\n{section}\n</section>" for section in sections),
        version=escape(metadata.version("secateur")),
    )


def html_table(table: Table, anchor: str = "") -> str:
    """Return a table as HTML, without the columns that have no text.

    Args:
        table: to show.
        anchor: if given, rows are numbered from 1, and each name links to the element whose id is ``anchor`` and then
            the number.
    """
    shown = [(index, table.columns[index]) for index in table.filled()]
    heads = ['<th scope="col" class="n">#</th>'] if anchor else []
    heads += [f'<th scope="col"{_class(column.is_number)}>{_text(column.heading)}</th>' for _, column in shown]
    lines = []
    for number, row in enumerate(table.rows):
        cells = [f'<td class="n soft">{number + 1}</td>'] if anchor else []
        for index, column in shown:
            text = _text(row[index])
            if index == 0:
                name = text.replace(".", ".<wbr>")
                name = f'<a href="#{escape(anchor)}{number + 1}">{name}</a>' if anchor else name
                cells.append(f'<th scope="row" class="name">{name}</th>')
                continue
            text = f"<strong>{text}</strong>" if (number, index) in table.strong else text
            text = text or ("\N{EN DASH}" if column.is_number else "")
            if column.bars and row[index]:
                text += f'<span class="meter"><i style="width:{100 * column.bars[number]:.1f}%"></i></span>'
            kind = ' class="whole"' if column.is_name else _class(column.is_number, column.is_note)
            cells.append(f"<td{kind}>{text}</td>")
        first = ' class="first"' if number in table.sections else ""
        lines.append(f"<tr{first}>{''.join(cells)}</tr>")
    tall = " tall" if len(table.rows) > _TALL else ""
    body = "\n".join(lines)
    notes = "".join(f'\n<p class="caption">{_text(note)}</p>' for note in table.notes)
    return (
        f'<div class="scroll{tall}" role="region" tabindex="0" aria-label="{escape(table.title)}">\n<table>\n'
        f"<caption>{escape(table.title)}</caption>\n<thead><tr>{''.join(heads)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n"
        f"</table>\n</div>{notes}"
    )


@cache
def resource(name: str) -> str:
    """Return the text of a template or style sheet that comes with secateur."""
    return resources.files("secateur.reports").joinpath(name).read_text(encoding="utf-8")


def _class(is_number: bool, is_note: bool = False) -> str:
    return ' class="n"' if is_number else ' class="notes"' if is_note else ""


def _text(text: str) -> str:
    return escape(text).replace("\n", "<br>")
