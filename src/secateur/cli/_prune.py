"""``secateur prune``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from secateur._errors import RecipeError
from secateur.cli._app import say, show, show_progress, user_errors, worth_saying, written_or_printed
from secateur.cli._options import (
    AsJson,
    Calibration,
    Device,
    Evaluate,
    Exclude,
    Html,
    Include,
    Overwrite,
    Samples,
    Seed,
    Select,
    SequenceLength,
)
from secateur.pruning import ALLOCATIONS, Recipe
from secateur.solvers import METHODS, ROUNDINGS

_METHOD_HELP = f"{', '.join(METHODS)}; add +refit to re-estimate the kept weights. Default: wanda."


def prune(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory with safetensors weights.")],
    output: Annotated[Path | None, typer.Option(help="Directory to write; it appears complete or not at all.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="unstructured, 2:4, block:16x16, row, column. Default: unstructured.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of each layer to prune, 0 to 1.")] = None,
    method: Annotated[str | None, typer.Option(help=_METHOD_HELP)] = None,
    allocation: Annotated[
        str | None, typer.Option(help=f"How zeros are shared out: {', '.join(ALLOCATIONS)}. Default: uniform.")
    ] = None,
    sparsity_bounds: Annotated[
        tuple[float, float] | None, typer.Option(help="Lowest and highest sparsity of a layer. Default: 0 1.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what each layer would lose, and change and write nothing.")
    ] = False,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe; options given beside it win.")] = None,
    calibration: Calibration = None,
    samples: Samples = 128,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    select: Select = "random",
    remainder: Annotated[
        str | None,
        typer.Option(help="Sizes that 2:4 or a block does not divide: error, or dense to leave the rest dense."),
    ] = None,
    include: Include = None,
    exclude: Exclude = None,
    rounds: Annotated[
        int | None,
        typer.Option(help="Prune in that many rounds, each to more sparsity, with statistics anew. Default: 1."),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(help=f"Round what is kept as well, for packing: {', '.join(ROUNDINGS)}. Default: it is not."),
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option(help="Share of the text that nothing is learned from: each layer's error is measured on it too."),
    ] = None,
    damping: Annotated[
        str | None,
        typer.Option(
            help="A number for the method's damping, or auto: the best of four for each layer, on --held-out."
        ),
    ] = None,
    permute: Annotated[
        bool,
        typer.Option("--permute", help="Reorder channels first, so that N:M keeps more. The model stays the same."),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option("--strict", help="Refuse layers that no text reaches, and experts that fewer than 64 tokens do."),
    ] = False,
    evaluate: Evaluate = None,
    html: Html = None,
    device: Device = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model directory. The output loads with from_pretrained, unchanged."""
    with user_errors():
        from secateur.files import check_file
        from secateur.huggingface import CalibrationText
        from secateur.permuting import permute_for
        from secateur.pruning import allocate_directory, prune_directory
        from secateur.reports import evaluation_table, pruned_table, require_page_extra, skipped_table

        settings = {
            "pattern": pattern,
            "sparsity": sparsity,
            "method": method,
            "allocation": allocation,
            "sparsity_bounds": sparsity_bounds,
            "remainder": remainder,
            "include": include,
            "exclude": exclude,
            "rounds": rounds,
            "rounding": rounding,
            "held_out": held_out,
            "damping": _number_or_name(damping),
            "strict": strict or None,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        text = None if calibration is None else CalibrationText(calibration, samples, sequence_length, seed, select)
        settled = Recipe.from_dict(given) if recipe is None else Recipe.load(recipe, given)
        if dry_run:
            if html is not None:
                check_file(html)
            with show_progress() as progress:
                allotted = allocate_directory(model, settled, calibration=text, device=device, progress=progress)
            if not written_or_printed(allotted, html, as_json):
                show(allotted.table)
                say(str(allotted))
            return
        if output is None:
            raise RecipeError("--output says where the pruned model goes. Give it, or --dry-run to look only.")
        if html is not None:
            check_file(html, output)
            require_page_extra()
        with show_progress() as progress:
            report = prune_directory(
                model,
                output,
                settled,
                calibration=text,
                evaluate=evaluate,
                device=device,
                overwrite=overwrite,
                prepare=(lambda *what: str(permute_for(what[0], what[1], what[2], progress))) if permute else None,
                progress=progress,
            )
        if written_or_printed(report, html, as_json):
            return
        show(pruned_table(report.layers), skipped_table(worth_saying(report.skipped)))
        if report.evaluation is not None:
            show(evaluation_table(report.evaluation))
        if prepared := report.calibration.get("prepared"):
            say(prepared)
        say(f"{report}\nwritten to {output}")


def _number_or_name(text: str | None) -> float | str | None:
    """What is written as a number is one; whether a name is known is for the recipe to say."""
    try:
        return text if text is None else float(text)
    except ValueError:
        return text
