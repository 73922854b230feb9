"""``secateur recover``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, use_threads, user_errors, written_or_printed
from secateur.cli._options import AsJson, Device, Evaluate, Html, Output, Overwrite

_INTERRUPTED = 130


def recover(
    model: Annotated[Path, typer.Argument(help="Model directory that was pruned or shrunk.")],
    dense: Annotated[Path, typer.Option(help="Directory of the model that it was made from.")],
    calibration: Annotated[Path, typer.Option(help="Text to learn from: plain, or JSON lines with a text field.")],
    output: Output,
    minutes: Annotated[
        float | None, typer.Option(help="Working time of training. Default: 10, unless --steps is given.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of training, in place of minutes.")] = None,
    method: Annotated[str, typer.Option(help="What is trained: full, norms, lora, blocks.")] = "full",
    loss: Annotated[
        str, typer.Option(help="auto, logits, embeddings or outputs: what should be as the dense model's.")
    ] = "auto",
    learning_rate: Annotated[float | None, typer.Option(help="The highest. Default: by method.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Rows of a step. Default: 64 sentences, or windows of 2,048 tokens.")
    ] = None,
    sequence_length: Annotated[
        int | None,
        typer.Option(min=16, help="Most tokens of a window or sentence. Default: what the model takes, at most 256."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=2, help="Windows or sentences drawn from the text. Default: all of it.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all that is drawn at random.")] = 0,
    evaluate: Evaluate = None,
    html: Html = None,
    device: Device = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to compute with. Default: PyTorch's.")] = None,
    overwrite: Overwrite = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, and ignore what earlier runs left.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train a pruned or shrunk model to give again what the dense one gives. Zeros and sizes stay."""
    with user_errors(output):
        from secateur.files import check_file
        from secateur.huggingface import CalibrationText
        from secateur.recovery import recover_directory

        if html is not None:
            check_file(html, output)
        text = calibration if samples is None else CalibrationText(calibration, samples, sequence_length, seed)
        with show_progress() as progress, use_threads(threads):
            report = recover_directory(
                model,
                output,
                dense=dense,
                calibration=text,
                method=method,
                loss=loss,
                minutes=minutes,
                steps=steps,
                learning_rate=learning_rate,
                batch_size=batch_size,
                sequence_length=sequence_length,
                seed=seed,
                evaluate=evaluate,
                device=device,
                overwrite=overwrite,
                restart=restart,
                progress=progress,
            )
        if not written_or_printed(report, html, as_json):
            show(*report.tables)
            say(f"{report}\nwritten to {output}")
        if report.interrupted:
            print(
                f"secateur: interrupted; the best state so far was written to {output}, and is complete. The same "
                "command with --overwrite goes on.",
                file=sys.stderr,
            )
            raise typer.Exit(_INTERRUPTED)
