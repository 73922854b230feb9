"""``secateur compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, user_errors, written_or_printed
from secateur.cli._options import AsJson, Html, SequenceLength, Threads, shapes_of


def compare(
    model: Annotated[Path, typer.Argument(help="Model directory: dense, pruned, shrunk or packed.")],
    evaluate: Annotated[Path, typer.Option(help="File to measure on: text, pairs or labels.")],
    dense: Annotated[Path | None, typer.Option(help="Directory of the dense model to compare with.")] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(help="Texts and tokens in each to time (repeatable). Default: 1x16 1x128 8x64 32x64."),
    ] = None,
    way: Annotated[
        list[str] | None, typer.Option(help="Way to run the models, such as onnx-int8 (repeatable). Default: all.")
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="Figure that the comparison is about. Default: what the file gives.")
    ] = None,
    memory: Annotated[bool, typer.Option(help="Measure memory, each way in a process of its own.")] = True,
    sequence_length: SequenceLength = None,
    threads: Threads = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Run a model in all ways that this machine has, and show how fast, small and good each is."""
    with user_errors():
        from secateur.comparison import compare_directory
        from secateur.files import check_file

        if html is not None:
            check_file(html)
        with show_progress() as progress:
            report = compare_directory(
                model,
                evaluate,
                dense=dense,
                shapes=shapes_of(shape),
                ways=way or None,
                metric=metric,
                sequence_length=sequence_length,
                threads=threads,
                memory=memory,
                progress=progress,
            )
        if written_or_printed(report, html, as_json):
            return
        show(*report.tables)
        say(str(report))
