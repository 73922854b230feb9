"""The rows of reports of shrinking, made once: for Markdown, a terminal and a page."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from secateur.reports._rows import block_of
from secateur.reports._shrink_records import (
    Boundary,
    Latency,
    ModelSize,
    RemovableDimension,
    ShrunkDimension,
)
from secateur.reports._tables import Table, TableColumn, bars

_LISTED = 2  # names in a cell
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)")


@dataclass(frozen=True)
class LayerBar:
    """What a page draws for one block of the model, or for a dimension outside of blocks.

    Args:
        name: of the block or dimension.
        is_gone: whether the whole block went.
        parts: for each dimension in it, its kind, and its units after and before.
    """

    name: str
    is_gone: bool
    parts: tuple[tuple[str, int, int], ...] = ()


def gone_blocks(dimensions: Iterable[ShrunkDimension]) -> frozenset[str]:
    """Return the qualified names of the blocks that were removed, as they were before."""
    return frozenset(f"{found.name}.{unit}" for found in dimensions if found.kind == "layers" for unit in found.removed)


def shrunk_table(dimensions: Sequence[ShrunkDimension]) -> Table:
    """Return a table with a row for each dimension that lost units, without those in blocks that were removed."""
    gone = gone_blocks(dimensions)
    left = [found for found in dimensions if not _is_inside(found.name, gone)]
    shown = [found for found in left if found.removed]
    errors = [found.error for found in shown]
    columns = (
        TableColumn("dimension"),
        TableColumn("kind"),
        TableColumn("before", is_number=True),
        TableColumn("after", is_number=True),
        TableColumn("kept", is_number=True, bars=bars([_share(found) for found in shown], longest=1.0)),
        TableColumn("score that went", is_number=True),
        TableColumn("error without", is_number=True),
        TableColumn("error", is_number=True, bars=bars(errors)),
        TableColumn("removed blocks"),
        TableColumn("notes", is_note=True),
    )
    rows = tuple(
        (
            found.name or "(root)",
            found.kind,
            f"{found.before:,}",
            f"{found.after:,}",
            f"{_share(found):.1%}",
            "" if found.score is None else f"{found.score:.2%}",
            "" if found.error_without is None else f"{found.error_without:.4f}",
            "" if found.error is None else f"{found.error:.4f}",
            ranges(found.removed) if found.kind == "layers" else "",
            "; ".join(found.notes),
        )
        for found in shown
    )
    sections = []
    for _, members in groupby(enumerate(shown), lambda pair: block_of(pair[1].name)):
        first, *others = members
        sections += [first[0]] if others else []
    notes = []
    if any(found.error is not None for found in shown):
        notes.append(
            "error without, error: of the output of the layers that read the units, without and with compensation, "
            "relative to the output before."
        )
    if len(shown) < len(left):
        notes.append(f"{len(left) - len(shown)} further dimensions kept all of their units.")
    return Table("Dimensions that lost units", columns, rows, tuple(notes), tuple(sections))


def size_table(before: ModelSize, after: ModelSize, latency: Latency | None) -> Table:
    """Return a table with a row for each figure of the whole model, before and after."""
    columns = (
        TableColumn("whole model"),
        *(TableColumn(heading, is_number=True) for heading in ("before", "after", "after / before")),
        TableColumn("measured at"),
    )
    shape = " x ".join(map(str, before.shape))
    rows = [
        _compared("parameters", before.parameters, after.parameters),
        _compared("bytes", before.nbytes, after.nbytes),
    ]
    if before.macs is not None and after.macs is not None:
        rows.append(_compared("multiply-adds", before.macs, after.macs, shape))
    if latency is not None:
        where = " x ".join(map(str, latency.shape))
        rows.append(
            (
                "milliseconds",
                f"{1e3 * latency.before:.4g}",
                f"{1e3 * latency.after:.4g}",
                f"{1 / latency.ratio:.3f}" if latency.ratio else "",
                f"{where}, {latency.dtype}: {latency.ratio:.2f} times as fast ({latency.low:.2f}-{latency.high:.2f})",
            )
        )
    note = (
        "multiply-adds: of matrix products, convolutions and attention in a forward pass on the first batch. "
        f"Norms, activations, softmax, sums and gathers are not counted{_uncounted(before)}."
    )
    return Table("Size and speed", columns, tuple(rows), () if before.macs is None else (note,))


def blocked_table(boundaries: Sequence[Boundary]) -> Table:
    """Return a table of what cannot be made smaller: a row for each operation and reason."""
    groups: dict[tuple[str, str], list[Boundary]] = {}
    for boundary in boundaries:
        groups.setdefault((boundary.operation, boundary.reason), []).append(boundary)
    rows = []
    for (operation, reason), found in sorted(groups.items(), key=lambda item: -len(item[1])):
        names = _merged([f"{boundary.tensor}[{boundary.dim}]" for boundary in found])
        sizes = dict.fromkeys(str(size) for size in sorted({boundary.size for boundary in found}))
        rows.append((_some(names), str(len(found)), _some(sizes), operation, reason))
    columns = (
        TableColumn("what stays[dimension]"),
        TableColumn("tensors", is_number=True),
        TableColumn("sizes", is_number=True),
        TableColumn("operation"),
        TableColumn("reason"),
    )
    return Table("What cannot be made smaller, and why", columns, tuple(rows))


def removable_table(dimensions: Sequence[RemovableDimension], parameters: int) -> Table:
    """Return a table of what could be removed: a row for dimensions that are alike but for the numbers in their names.

    Args:
        dimensions: that were found.
        parameters: of the whole model.
    """
    groups: dict[tuple[object, ...], list[RemovableDimension]] = {}
    for found in dimensions:
        key = (_starred(found.name), found.kind, found.units, found.parameters, found.group_size, found.notes)
        groups.setdefault(key, []).append(found)
    rows = []
    for alike in groups.values():
        first = alike[0]
        total = len(alike) * first.units * first.parameters
        notes = list(first.notes)
        if first.group_size:
            notes.insert(0, f"the same number from each {first.group_size} in a row")
        rows.append(
            (
                _merged([found.name for found in alike])[0] or "(root)",
                first.kind,
                str(len(alike)),
                f"{first.units:,}",
                f"{first.parameters:,}",
                f"{total / parameters:.1%}" if parameters else "",
                "; ".join(notes),
            )
        )
    headings = ("dimensions", "units in each", "parameters of a unit", "of the model")
    columns = (
        TableColumn("where"),
        TableColumn("kind"),
        *(TableColumn(heading, is_number=True) for heading in headings),
        TableColumn("notes", is_note=True),
    )
    return Table("What can be removed", columns, tuple(rows))


def layer_bars(dimensions: Sequence[ShrunkDimension]) -> tuple[LayerBar, ...]:
    """Return what a page draws: for each block of the model before, whether it went, or which units stayed."""
    gone = gone_blocks(dimensions)
    names: dict[str, list[ShrunkDimension]] = {}
    for found in dimensions:
        if found.kind == "layers":
            for unit in range(found.before):
                names.setdefault(f"{found.name}.{unit}".lstrip("."), [])
    for found in dimensions:
        if found.kind != "layers":
            block = next((name for name in names if _is_inside(found.name, (name,))), found.name)
            names.setdefault(block, []).append(found)
    return tuple(
        LayerBar(
            name or "(root)",
            name in gone or _is_inside(name, gone),
            tuple((found.kind, found.after, found.before) for found in members),
        )
        for name, members in names.items()
    )


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as text, those in a row as a range.

    Example:
        >>> from secateur.reports._shrink_rows import ranges
        >>> ranges((2, 3, 4, 7))
        '2-4, 7'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def _is_inside(name: str, blocks: Iterable[str]) -> bool:
    return any(name == block or name.startswith(f"{block}.") for block in blocks)


def _share(found: ShrunkDimension) -> float:
    return found.after / found.before if found.before else 1.0


def _compared(name: str, before: int, after: int, where: str = "") -> tuple[str, ...]:
    return name, f"{before:,}", f"{after:,}", f"{after / before:.3f}" if before else "", where


def _uncounted(size: ModelSize) -> str:
    return f", nor are {', '.join(size.uncounted)}" if size.uncounted else ""


def _starred(name: str) -> str:
    """A name with ``*`` for each number in it, so that the same place of all blocks has one name."""
    return _NUMBER.sub("*", name)


def _merged(names: Sequence[str]) -> list[str]:
    """Names with ``*`` for the numbers in which they differ, each once."""
    alike: dict[str, list[list[str]]] = {}
    for name in names:
        alike.setdefault(_starred(name), []).append(name.split("."))
    return [
        ".".join(parts[0] if len(set(parts)) == 1 else "*" for parts in zip(*found, strict=True))
        for found in alike.values()
    ]


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
