"""``secateur export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, use_threads, user_errors, written_or_printed
from secateur.cli._options import AsJson, Html, Output, Overwrite, Seed, Threads


def export(
    model: Annotated[Path, typer.Argument(help="Model directory: dense, pruned, shrunk or packed.")],
    output: Output,
    to: Annotated[
        str, typer.Option(help="onnx, openvino; or dense: a packed model with plain weights, zeros included.")
    ] = "dense",
    int8: Annotated[bool, typer.Option("--int8", help="Compute matrix products in 8 bits.")] = False,
    bfloat16: Annotated[bool, typer.Option("--bfloat16", help="Let OpenVINO compute the rest in bfloat16.")] = False,
    packed: Annotated[
        bool, typer.Option("--packed", help="Run layers with many zeros by secateur's kernels, inside the engine.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option(help="Text from which OpenVINO takes ranges for 8 bits. Default: found in each call.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sentences drawn from that text.")] = 128,
    seed: Seed = 0,
    threads: Threads = None,
    html: Html = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a model for ONNX Runtime or OpenVINO, checked and measured; or a packed one as a plain dense one."""
    with user_errors(), use_threads(threads):
        from secateur._errors import RecipeError
        from secateur.exporting import export_directory
        from secateur.files import check_file
        from secateur.huggingface import CalibrationText

        if to == "dense" and (html is not None or as_json):
            raise RecipeError("--html and --json show how an exported model compares. Give --to onnx or --to openvino.")
        if html is not None:
            check_file(html, output)
        with show_progress() as progress:
            report = export_directory(
                model,
                output,
                to=to,
                int8=int8,
                bfloat16=bfloat16,
                packed=packed,
                calibration=None if calibration is None else CalibrationText(calibration, samples, seed=seed),
                overwrite=overwrite,
                progress=progress,
            )
        if report is None:
            say(f"written to {output}")
            return
        if written_or_printed(report, html, as_json):
            return
        show(*report.tables)
        say(f"{report}\nwritten to {output}")
