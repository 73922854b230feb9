"""Arguments and options that several commands have, each defined once."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from secateur.calibration import SELECTIONS

DEFAULT_BATCHES = (1, 8, 32, 128)

Output = Annotated[Path, typer.Option(help="Directory to write the model to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output directory.")]
Include = Annotated[list[str] | None, typer.Option(help="Only layers matching this glob (repeatable).")]
Exclude = Annotated[list[str] | None, typer.Option(help="Leave out layers matching this glob (repeatable).")]
Batch = Annotated[list[int] | None, typer.Option(help="Input rows to measure at (repeatable). Default: 1 8 32 128.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads to measure with. Default: PyTorch's.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the results as JSON.")]
Html = Annotated[Path | None, typer.Option(help="Also write the results as a web page.")]

Calibration = Annotated[Path | None, typer.Option(help="Text to calibrate on: plain, or JSON lines with a text field.")]
Samples = Annotated[int, typer.Option(min=1, help="Calibration windows drawn from the text.")]
SequenceLength = Annotated[
    int | None, typer.Option(min=16, help="Tokens in a window. Default: what the model takes, at most 2048.")
]
Seed = Annotated[int, typer.Option(help="Of the draw of calibration windows.")]
Select = Annotated[
    str, typer.Option(help=f"Which windows are taken: {', '.join(SELECTIONS)} (those with most different tokens).")
]
Evaluate = Annotated[Path | None, typer.Option(help="File to measure on, before and after: text, pairs or labels.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")]


def shapes_of(given: Sequence[str] | None) -> list[tuple[int, int]] | None:
    """Return shapes of inputs such as ``8x64``: texts, and tokens in each; None without any.

    Raises:
        RecipeError: a text is no shape.
    """
    return [_shape(text) for text in given] if given else None


def _shape(text: str) -> tuple[int, int]:
    from secateur._errors import RecipeError

    found = re.fullmatch(r"\s*(\d{1,6})\s*[x\N{MULTIPLICATION SIGN}]\s*(\d{1,6})\s*", text)
    if found is None:
        raise RecipeError(f"--shape is texts x tokens, such as 8x64; got {text!r:.40}.")
    return int(found[1]), int(found[2])
