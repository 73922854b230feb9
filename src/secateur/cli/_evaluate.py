"""``secateur evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, user_errors, written_or_printed
from secateur.cli._options import AsJson, Device, Html, SequenceLength


def evaluate(
    model: Annotated[Path, typer.Argument(help="Model directory: dense, pruned, shrunk or packed.")],
    evaluate: Annotated[
        list[Path],
        typer.Option(help="File to measure on: text; text,label; sentence1,sentence2,score (repeatable)."),
    ],
    dense: Annotated[Path | None, typer.Option(help="Directory of the dense model to compare with.")] = None,
    sequence_length: SequenceLength = None,
    html: Html = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure a model: perplexity, similarity to the dense model, ranks, accuracy, by what the files hold."""
    with user_errors():
        from secateur.files import check_file
        from secateur.pipeline import evaluate_directory

        if html is not None:
            check_file(html)
        with show_progress() as progress:
            report = evaluate_directory(
                model, evaluate, dense, sequence_length=sequence_length, device=device, progress=progress
            )
        if written_or_printed(report, html, as_json):
            return
        show(*report.tables)
        for note in report.notes:
            say(note)
