"""``secateur pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, use_threads, user_errors, worth_saying, written_or_printed
from secateur.cli._options import (
    DEFAULT_BATCHES,
    AsJson,
    Batch,
    Exclude,
    Html,
    Include,
    Output,
    Overwrite,
    Samples,
    Seed,
    Select,
    Threads,
)


def pack(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory with safetensors weights.")],
    output: Output,
    value_dtype: Annotated[
        str | None,
        typer.Option(help="Store values as float32, bfloat16, float16, int8 or int4. Default: as they are."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Arithmetic: exact, bfloat16 or int8. The latter two also pack layers without zeros."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Largest relative error of outputs; the fastest precision of each layer within it is taken."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to measure the errors of outputs on. --tolerance needs it.")
    ] = None,
    samples: Samples = 16,
    sequence_length: Annotated[
        int | None, typer.Option(min=16, help="Tokens in a window. Default: what the model takes, at most 128.")
    ] = None,
    seed: Seed = 0,
    select: Select = "random",
    batch: Batch = None,
    include: Include = None,
    exclude: Exclude = None,
    memory: Annotated[
        float, typer.Option(help="What kernels may keep of a layer, in multiples of its dense bytes.")
    ] = 1.0,
    cache: Annotated[Path | None, typer.Option(help="JSON file of measurements to read and add to.")] = None,
    threads: Threads = None,
    html: Html = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Pack the layers that get smaller and faster by it. secateur.load reads the output.

    Without --precision or --tolerance these are layers with zeros, and results stay as they are.
    """
    with user_errors(), use_threads(threads):
        from secateur.files import check_file
        from secateur.huggingface import CalibrationText
        from secateur.packing import PackSettings, pack_directory
        from secateur.reports import model_times_table, packed_table, skipped_table

        if html is not None:
            check_file(html, output)
        with show_progress() as progress:
            report = pack_directory(
                model,
                output,
                PackSettings(
                    batch_sizes=tuple(batch or DEFAULT_BATCHES),
                    value_dtype=value_dtype,  # type: ignore[arg-type]  # its name is taken too
                    include=tuple(include or ()),
                    exclude=tuple(exclude or ()),
                    memory=memory,
                    precision=precision,
                    tolerance=tolerance,
                ),
                calibration=(
                    None
                    if calibration is None
                    else CalibrationText(calibration, samples, sequence_length, seed, select)
                ),
                cache=cache,
                overwrite=overwrite,
                progress=progress,
            )
        if written_or_printed(report, html, as_json):
            return
        show(model_times_table(report.times), packed_table(report.layers), skipped_table(worth_saying(report.skipped)))
        for remark in filter(None, (report.warning, *report.notes)):
            say(f"{remark}\n")
        say(f"{report}\nwritten to {output}")
