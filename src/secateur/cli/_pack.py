"""``secateur pack``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, use_threads, user_errors, worth_saying, written_or_printed
from secateur.cli._options import DEFAULT_BATCHES, AsJson, Batch, Exclude, Html, Include, Output, Overwrite, Threads


def pack(
    model: Annotated[Path, typer.Argument(help="Pruned Hugging Face model directory with safetensors weights.")],
    output: Output,
    value_dtype: Annotated[
        str | None, typer.Option(help="Store values as float32, bfloat16, float16 or int8. Default: as they are.")
    ] = None,
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
    """Pack the layers that get smaller and faster by it. secateur.load reads the output."""
    with user_errors(), use_threads(threads):
        from secateur.files import check_file
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
