"""A text in three parts: to learn from, to choose by, and to report on. No document is in two of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from secateur._errors import RecipeError
from secateur.calibration import read_text, split_sentences

_PARTS = (0.7, 0.15, 0.15)
_LEAST = 40  # sentences to choose by, and to report on; with fewer, chance decides
_BETWEEN = re.compile(r"\n\s*\n")


@dataclass(frozen=True)
class Split:
    """The three parts of a text.

    Args:
        learn: what models learn from.
        choose: what decides between models.
        report: what is only measured on once, at the end.
    """

    learn: str
    choose: str
    report: str


def split_text(path: str | Path) -> Split:
    """Return the text in a file in three parts of 70, 15 and 15 percent, cut between documents.

    Documents are what blank lines part, or the lines of JSON lines. They stay in their order, so that neighbours, which
    are about the same, are mostly in one part.

    Raises:
        StatisticsError: the file cannot be read.
        RecipeError: it is too short, with the length that is needed.
    """
    text = read_text(path)
    documents = [found for found in _BETWEEN.split(text) if found.strip()]
    total = sum(map(len, documents))
    ends = (total * _PARTS[0], total * (_PARTS[0] + _PARTS[1]))
    parts: tuple[list[str], list[str], list[str]] = ([], [], [])
    seen = 0
    for document in documents:
        middle = seen + len(document) / 2
        parts[sum(middle >= end for end in ends)].append(document)
        seen += len(document)
    learn, choose, report = ("\n\n".join(part) + "\n" for part in parts)
    counts = [len(split_sentences(part)) for part in (choose, report)]
    if min(counts) < _LEAST:
        needed = round(total * _LEAST / max(min(counts), 1) * 1.2, -3)
        raise RecipeError(
            f"{path} is too short to learn from, to choose by and to report on: of {len(documents)} documents and "
            f"{total:,} characters, the last two parts get {counts[0]} and {counts[1]} sentences, and {_LEAST} are "
            f"needed in each.\nGive about {needed:,.0f} characters in more documents, parted by blank lines."
        )
    return Split(learn, choose, report)
