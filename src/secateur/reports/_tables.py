"""Tables of text. The rows of a report are made once; Markdown, a terminal and a page show the same ones."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TableColumn:
    """One column of a table.

    Args:
        heading: of the column.
        is_number: its cells are figures, aligned at the right.
        is_note: its cells are remarks of any length. A terminal prints them below the table.
        is_name: its cells are names, which a page does not break.
        bars: for each row a part of the longest bar, 0 to 1, which a page draws below the cell. Empty for no bars.
    """

    heading: str
    is_number: bool = False
    is_note: bool = False
    is_name: bool = False
    bars: tuple[float, ...] = ()


@dataclass(frozen=True)
class Table:
    """Cells of text in rows and columns. The first column names the row.

    Args:
        title: what the rows are.
        columns: one for each cell of a row.
        rows: of cells. A cell may hold several lines; an empty cell says that there is no figure.
        notes: sentences below the table.
        sections: indices of the rows that begin a new section.
        strong: row and column of the cells that stand out.

    Example:
        >>> from secateur.reports import Table, TableColumn
        >>> columns = TableColumn("layer"), TableColumn("sparsity", is_number=True)
        >>> table = Table("Layers", columns, (("up", "50.00%"),))
        >>> print(table.to_markdown())
        | layer | sparsity |
        |---|---:|
        | up | 50.00% |
    """

    title: str
    columns: tuple[TableColumn, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    sections: tuple[int, ...] = ()
    strong: tuple[tuple[int, int], ...] = ()

    def filled(self) -> tuple[int, ...]:
        """Return the indices of the columns that have text in some cell."""
        return tuple(index for index in range(len(self.columns)) if any(row[index] for row in self.rows))

    def to_markdown(self) -> str:
        """Return the rows as a Markdown table, and the notes below it, without the title."""
        lines = [[markdown_text(column.heading) for column in self.columns]]
        for number, row in enumerate(self.rows):
            cells = [markdown_text(cell) for cell in row]
            strong = [index for place, index in self.strong if place == number]
            lines.append([f"**{cell}**" if index in strong else cell for index, cell in enumerate(cells)])
        texts = [f"| {' | '.join(cells)} |" for cells in lines]
        texts.insert(1, "|" + "".join("---:|" if column.is_number else "---|" for column in self.columns))
        return "\n".join(texts + [f"\n{markdown_text(note)}" for note in self.notes])


def markdown_text(text: str) -> str:
    """Return text that stays within one cell of a Markdown table and contains no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def sentence(text: str) -> str:
    """Return text that begins with a capital letter."""
    return text[:1].upper() + text[1:]


def size(shape: tuple[int, int]) -> str:
    """Return the shape of a matrix as text."""
    return f"{shape[0]} x {shape[1]}"


def figure(value: float | None) -> str:
    """Return a number with four significant digits; empty text for what was not measured."""
    if value is None:
        return ""
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:#.4g}".removesuffix(".")


def usable(value: float | None) -> float | None:
    """Return the value if it is a finite number, else None."""
    return value if value is not None and math.isfinite(value) else None


def bars(values: list[float | None], longest: float | None = None) -> tuple[float, ...]:
    """Return the length of a bar for each value, as a part of the longest; no bar for what is not a finite number.

    Args:
        values: at least 0.
        longest: what the longest bar stands for, by default the largest of the values.
    """
    finite = [usable(value) or 0.0 for value in values]
    longest = longest or max(finite, default=0.0)
    return tuple(min(max(value / longest, 0.0), 1.0) if longest else 0.0 for value in finite)
