"""``secateur plan`` and ``secateur optimize``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from secateur.cli._app import say, show, show_progress, user_errors, written_or_printed
from secateur.cli._options import AsJson, Html, Overwrite, Seed, SequenceLength, Threads, shapes_of

if TYPE_CHECKING:
    from secateur.reports import PlanReport

_Model = Annotated[Path, typer.Argument(help="Hugging Face model directory with safetensors weights.")]
_Text = Annotated[Path, typer.Option(help="Text to learn from and to choose by: plain, or JSON lines.")]
_Target = Annotated[str | None, typer.Option(help="What to reach: 4x, 12ms, 20MB, params=0.4, or several with commas.")]
_MaxLoss = Annotated[str | None, typer.Option(help="The most that may be lost: 1% of the figure, or 0.5 in its unit.")]
_Shape = Annotated[
    list[str] | None,
    typer.Option(help="Texts and tokens in each at which time counts (repeatable). Default: as the text has them."),
]
_Allow = Annotated[list[str] | None, typer.Option(help="What may be done, with commas: layers,ffn,heads,2:4,int8,...")]
_Engines = Annotated[list[str] | None, typer.Option(help="What may run it, with commas: torch,onnxruntime,openvino.")]
_Allocation = Annotated[str | None, typer.Option(help="best, or uniform for the same size in all parts of a kind.")]
_Evaluate = Annotated[Path | None, typer.Option(help="File that alone the result is measured on.")]
_Windows = Annotated[int, typer.Option(min=1, help="Windows of the text for scores and fits.")]
_Csv = Annotated[Path | None, typer.Option(help="Also write all points as CSV.")]
_Cache = Annotated[Path | None, typer.Option(help="File of measured times, to read and to add to.")]


def plan(
    model: _Model,
    calibration: _Text,
    target: _Target = None,
    max_loss: _MaxLoss = None,
    evaluate: _Evaluate = None,
    shape: _Shape = None,
    allow: _Allow = None,
    engines: _Engines = None,
    allocation: _Allocation = None,
    samples: _Windows = 128,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    cache: _Cache = None,
    threads: Threads = None,
    html: Html = None,
    csv: _Csv = None,
    as_json: AsJson = False,
) -> None:
    """Say what could be made of a model for a target on this machine. Nothing is written.

    Without a target the frontier is shown, and nothing is decided. Exit status 1: the target is missed as measured.
    """
    with user_errors():
        from secateur.files import check_file
        from secateur.planning import plan_directory

        for file in filter(None, (html, csv)):
            check_file(file)
        with show_progress() as progress:
            report = plan_directory(
                model,
                calibration=calibration,
                target=target,
                max_loss=max_loss,
                evaluate=evaluate,
                shapes=shapes_of(shape),
                allow=_names(allow),
                engines=_names(engines),
                allocation=allocation,
                threads=threads,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                cache=cache,
                progress=progress,
            )
        _shown(report, html, csv, as_json, "")
        if report.target and not report.reached:
            raise typer.Exit(1)


def optimize(
    model: _Model,
    calibration: _Text,
    output: Annotated[Path | None, typer.Option(help="Directory to write the model to.")] = None,
    target: _Target = None,
    max_loss: _MaxLoss = None,
    minutes: Annotated[float, typer.Option(help="For all of it.")] = 30.0,
    evaluate: _Evaluate = None,
    shape: _Shape = None,
    allow: _Allow = None,
    engines: _Engines = None,
    allocation: _Allocation = None,
    gate: Annotated[list[str] | None, typer.Option(help="That the result must pass (repeatable), as in run.")] = None,
    samples: _Windows = 128,
    sequence_length: SequenceLength = None,
    seed: Seed = 0,
    cache: _Cache = None,
    threads: Threads = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only plan, and write nothing.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Ignore what earlier runs did.")] = False,
    overwrite: Overwrite = False,
    html: Html = None,
    csv: _Csv = None,
    as_json: AsJson = False,
) -> None:
    """Make the model that loses least and reaches a target on this machine: plan, make, train, measure.

    The same command goes on where an earlier one was stopped. Exit status 1: the result misses the target.
    """
    if dry_run:
        plan(
            model,
            calibration,
            target,
            max_loss,
            evaluate,
            shape,
            allow,
            engines,
            allocation,
            samples,
            sequence_length,
            seed,
            cache,
            threads,
            html,
            csv,
            as_json,
        )
        return
    with user_errors(work=output):
        from secateur._errors import RecipeError
        from secateur.files import check_file
        from secateur.planning import optimize_directory

        if output is None:
            raise RecipeError("--output says where the model goes. Give it, or --dry-run to plan only.")
        for file in filter(None, (html, csv)):
            check_file(file, output)
        with show_progress() as progress:
            report = optimize_directory(
                model,
                output,
                calibration=calibration,
                target=target,
                max_loss=max_loss,
                evaluate=evaluate,
                minutes=minutes,
                shapes=shapes_of(shape),
                allow=_names(allow),
                engines=_names(engines),
                allocation=allocation,
                threads=threads,
                samples=samples,
                sequence_length=sequence_length,
                seed=seed,
                cache=cache,
                overwrite=overwrite,
                restart=restart,
                gates=gate or (),
                progress=progress,
            )
        _shown(report, html, csv, as_json, f"\nwritten to {output}")
        if not report.reached:
            raise typer.Exit(1)


def _shown(report: PlanReport, html: Path | None, csv: Path | None, as_json: bool, written: str) -> None:
    from secateur.files import write_text

    if csv is not None:
        write_text(csv, report.to_csv())
    if not written_or_printed(report, html, as_json):
        show(*report.tables)
        say(f"{report}{written}")


def _names(given: Sequence[str] | None) -> list[str] | None:
    """Names with commas between them, in one option or in several; None without any."""
    if not given:
        return None
    return [name.strip() for text in given for name in text.split(",") if name.strip()]
