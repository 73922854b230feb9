"""``secateur run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, use_threads, user_errors, written_or_printed
from secateur.cli._options import AsJson, Device, Html, Overwrite, Threads


def run(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory with safetensors weights.")],
    recipe: Annotated[Path, typer.Option(help="TOML file with the stages and their gates.")],
    output: Annotated[Path | None, typer.Option(help="Directory to write the model to.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Ignore what earlier runs did.")] = False,
    overwrite: Overwrite = False,
    device: Device = None,
    threads: Threads = None,
    html: Html = None,
    as_json: AsJson = False,
) -> None:
    """Run the stages of a recipe: prune, shrink, recover, evaluate, pack. Only what passes its gates is written.

    The same command goes on where an earlier one was stopped. Exit status 1: a gate failed.
    """
    with user_errors(work=output), use_threads(threads):
        from secateur._errors import RecipeError
        from secateur.files import check_file
        from secateur.pipeline import Pipeline

        pipeline = Pipeline.load(recipe)
        if dry_run:
            with show_progress() as progress:
                forecast = pipeline.dry_run(model, progress)
            if as_json:
                print(forecast.to_json())
            else:
                say(str(forecast))
            if not forecast.can_run:
                raise typer.Exit(2)
            return
        if output is None:
            raise RecipeError("--output says where the model goes. Give it, or --dry-run to look only.")
        if html is not None:
            check_file(html, output)
        with show_progress() as progress:
            report = pipeline.run(model, output, device=device, overwrite=overwrite, restart=restart, progress=progress)
        if not written_or_printed(report, html, as_json):
            show(*report.tables)
            say(f"{report}\nwritten to {output}" if report.passed else str(report))
        if not report.passed:
            raise typer.Exit(1)
