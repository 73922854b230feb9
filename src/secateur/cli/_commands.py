"""The ``secateur`` command: parse, call, print."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

import secateur
from secateur._errors import SparsityError
from secateur.pruning import Recipe
from secateur.solvers import METHODS

app = typer.Typer(
    help="Make PyTorch models sparse and get the benefit.", no_args_is_help=True, pretty_exceptions_enable=False
)

_METHOD_HELP = f"{', '.join(METHODS)}; add +refit to re-estimate the kept weights. Default: wanda."


def main() -> None:
    """Run the command. A user's mistake ends with one message and exit status 2, an interrupt with 130."""
    app()


def _version(show: bool) -> None:
    if show:
        print(f"secateur {secateur.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def prune(
    model: Annotated[Path, typer.Argument(help="Hugging Face model directory with safetensors weights.")],
    output: Annotated[Path, typer.Option(help="Directory to write the pruned model to.")],
    pattern: Annotated[
        str | None, typer.Option(help="unstructured, 2:4, block:16x16, row, column. Default: unstructured.")
    ] = None,
    sparsity: Annotated[float | None, typer.Option(help="Fraction of each layer to prune, 0 to 1.")] = None,
    method: Annotated[str | None, typer.Option(help=_METHOD_HELP)] = None,
    recipe: Annotated[Path | None, typer.Option(help="TOML recipe; options given beside it win.")] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="Text to calibrate on: plain, or JSON lines with a text field.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calibration windows drawn from the text.")] = 128,
    sequence_length: Annotated[
        int | None, typer.Option(min=16, help="Tokens in a window. Default: what the model takes, at most 2048.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw of calibration windows.")] = 0,
    include: Annotated[
        list[str] | None, typer.Option(help="Prune only layers matching this glob (repeatable).")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out layers matching this glob (repeatable).")] = None,
    evaluate: Annotated[Path | None, typer.Option(help="Text to measure on, before and after.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the report as a web page.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ... Default: a GPU if there is one.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Prune a model directory. The output loads with from_pretrained, unchanged."""
    with _user_errors():
        from secateur.files import check_place, write_text
        from secateur.huggingface import CalibrationText
        from secateur.pruning import prune_directory

        settings = {"pattern": pattern, "sparsity": sparsity, "method": method, "include": include, "exclude": exclude}
        given = {name: value for name, value in settings.items() if value is not None}
        if html is not None:
            check_place(html)
        with _progress() as progress:
            report = prune_directory(
                model,
                output,
                Recipe.from_dict(given) if recipe is None else Recipe.load(recipe, given),
                calibration=None
                if calibration is None
                else CalibrationText(calibration, samples, sequence_length, seed),
                evaluate=evaluate,
                device=device,
                overwrite=overwrite,
                progress=progress,
            )
        if html is not None:
            write_text(html, report.to_html())
        if as_json:
            print(report.to_json())
        else:
            _print_report(report, output)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A .safetensors file or a model directory.")],
    show_all: Annotated[bool, typer.Option("--all", help="List vectors too, not only matrices.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show the sparsity of every stored tensor and the patterns that its zeros satisfy."""
    with _user_errors():
        from secateur.files import inspect as summaries

        found = [summary for summary in summaries(path) if show_all or len(summary.shape) > 1]
        if as_json:
            rows = [
                {
                    "name": summary.name,
                    "shape": summary.shape,
                    "dtype": summary.dtype,
                    "sparsity": summary.sparsity,
                    "patterns": [str(pattern) for pattern in summary.patterns],
                }
                for summary in found
            ]
            print(json.dumps(rows, indent=1))
            return
        table = Table("tensor", "shape", "dtype", box=None)
        table.add_column("sparsity", justify="right")
        table.add_column("patterns its zeros satisfy")
        for summary in found:
            shape = " x ".join(map(str, summary.shape))
            patterns = ", ".join(map(str, summary.patterns))
            table.add_row(escape(summary.name), shape, summary.dtype, f"{summary.sparsity:.2%}", patterns)
        _console().print(table)


@app.command()
def pack(
    model: Annotated[Path, typer.Argument(help="Pruned Hugging Face model directory with safetensors weights.")],
    output: Annotated[Path, typer.Option(help="Directory to write the packed model to.")],
    value_dtype: Annotated[
        str | None, typer.Option(help="Store values as float32, bfloat16, float16 or int8. Default: as they are.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Input rows to measure at. Default: 1 8 32 128.")] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pack only layers matching this glob.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Leave out layers matching this glob.")] = None,
    memory: Annotated[
        float, typer.Option(help="What kernels may keep of a layer, in multiples of its dense bytes.")
    ] = 1.0,
    cache: Annotated[Path | None, typer.Option(help="JSON file of measurements to read and add to.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads to measure with. Default: PyTorch's.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output directory.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Pack the layers that get smaller and faster by it. secateur.load reads the output."""
    with _user_errors(), _threads(threads):
        from secateur.packing import pack_directory

        with _progress() as progress:
            report = pack_directory(
                model,
                output,
                value_dtype=value_dtype,
                batch_sizes=batch or (1, 8, 32, 128),
                include=include or (),
                exclude=exclude or (),
                memory=memory,
                cache=cache,
                overwrite=overwrite,
                progress=progress,
            )
        if as_json:
            print(report.to_json())
            return
        console = _console()
        table = Table("layer", "shape", "pattern", "format", box=None)
        for heading in ("density", "error", "bytes", "while running"):
            table.add_column(heading, justify="right")
        table.add_column("speed over dense, by batch")
        from secateur.reports import speeds

        for layer in report.layers:
            kept = layer.stored_bytes if layer.packed else layer.dense_bytes
            running = kept + layer.runtime_bytes * layer.packed
            table.add_row(
                escape(layer.name),
                f"{layer.shape[0]} x {layer.shape[1]}",
                layer.pattern,
                f"{layer.format} {layer.value_dtype}" if layer.packed else "dense",
                f"{layer.density:.1%}",
                f"{layer.error:.4f}" if layer.packed else "",
                f"{kept / layer.dense_bytes:.2f}",
                f"{running / layer.dense_bytes:.2f}",
                escape(speeds(layer)),
            )
        console.print(table)
        for skip in report.skipped:
            if skip.reason not in ("no weight matrix", "excluded", "not included"):
                console.print(f"skipped {escape(skip.name or '(root)')}: {escape(skip.reason)}")
        if report.warning:
            console.print(f"\n{report.warning}")
        console.print(f"{report}\nwritten to {output}")


@app.command()
def export(
    packed: Annotated[Path, typer.Argument(help="Directory that secateur pack wrote.")],
    output: Annotated[Path, typer.Option(help="Directory to write the dense model to.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output directory.")] = False,
) -> None:
    """Write a packed model as a plain dense one, zeros included, that any tool reads."""
    with _user_errors():
        from secateur.packing import export_directory

        export_directory(packed, output, overwrite=overwrite)
        _console().print(f"written to {output}")


@app.command()
def bench(
    model: Annotated[
        Path | None, typer.Argument(help="Pruned Hugging Face model directory; each kind of its layers is measured.")
    ] = None,
    shape: Annotated[str, typer.Option(help="Outputs x inputs of a random layer to measure instead.")] = "4096x4096",
    pattern: Annotated[
        str, typer.Option(help="Its pattern: unstructured, 2:4, block:16x16, row, column.")
    ] = "unstructured",
    sparsity: Annotated[
        float | None, typer.Option(help="Its fraction of zeros. Default: 0.9, or what the pattern fixes.")
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Input rows. Default: 1 8 32 128.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads. Default: PyTorch's.")] = None,
    html: Annotated[Path | None, typer.Option(help="Also write a page with bars.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Show how fast this machine runs sparse layers by every means: dense, prepacked, torch CSR, int8, and ours."""
    with _user_errors(), _threads(threads):
        from secateur import packing
        from secateur._errors import RecipeError
        from secateur.files import check_place, write_text
        from secateur.patterns import SparsityPattern

        batches = batch or [1, 8, 32, 128]
        if min(batches) < 1:
            raise RecipeError(f"a batch has 1 row or more, got {min(batches)}.")
        if html is not None:
            check_place(html)
        if model is not None:
            with _progress() as progress:
                results = packing.bench_directory(model, batches, progress=progress)
        else:
            sizes = shape.split("x")
            if len(sizes) != 2 or not all(size.isdecimal() and 0 < int(size) <= 65536 for size in sizes):
                raise RecipeError(f"--shape should be OUTxIN, such as 4096x4096, got {shape!r}.")
            parsed = SparsityPattern.parse(pattern)
            if sparsity is None and parsed.sparsity is None:
                sparsity = 0.9
            weight = packing.made_weight((int(sizes[0]), int(sizes[1])), parsed, sparsity)
            results = packing.bench_weight(weight, batches)
        if html is not None:
            write_text(html, packing.bench_page(results))
        if as_json:
            print(json.dumps(packing.bench_table(results), indent=1))
            return
        console = _console()
        for layer in dict.fromkeys(result.layer for result in results):
            table = Table("batch", "F.linear", *packing.CONTENDERS, "fastest of ours", box=None, title=escape(layer))
            own = [result for result in results if result.layer == layer]
            for rows in dict.fromkeys(result.rows for result in own):
                cells = [result for result in own if result.rows == rows]
                dense = next((r.dense_seconds for r in cells if r.dense_seconds is not None), 0.0)
                ours = [r for r in cells if r.contender in packing.OURS and r.ratio is not None]
                best = max(ours, key=lambda r: r.ratio or 0.0).way if ours else "-"
                table.add_row(str(rows), f"{1000 * dense:.3f} ms", *map(packing.bench_cell, cells), escape(best))
            console.print(table)
            for note in dict.fromkeys(f"{r.contender}: {r.note}" for r in own if r.note):
                console.print(escape(note))
        console.print("\nSpeed as a multiple of eager F.linear in float32, quartiles in brackets.")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Directory for the report page and figures.")] = Path("demo-output"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Prune the small language model that comes with secateur, by every method, compare, and run the result packed."""
    with _user_errors():
        from secateur.demo import run, run_packed

        console = _console()
        if not as_json:
            console.print("Pruning a small language model trained on Python source; perplexity on held-out modules.\n")
        with _progress() as progress:
            rows = run(output, progress)
        with _progress() as progress:
            packed = run_packed(progress)
        if as_json:
            print(json.dumps({"pruned": rows, "packed": packed}, indent=1))
            return
        table = Table("method", "target", box=None)
        for heading in ("sparsity", "perplexity before", "after", "layer error", "seconds"):
            table.add_column(heading, justify="right")
        for row in rows:
            table.add_row(
                row["method"],
                row["target"],
                f"{row['sparsity']:.2%}",
                f"{row['before']:.2f}",
                f"{row['after']:.2f}",
                f"{row['error']:.4f}",
                f"{row['seconds']:.1f}",
                end_section=row is rows[-1],
            )
        console.print(table)
        table = Table("packed", "input", box=None)
        for heading in ("weights, dense", "packed file", "tokens/s, dense", "packed", "ratio", "largest difference"):
            table.add_column(heading, justify="right")
        for row in packed:
            table.add_row(
                row["target"],
                f"{row['windows']} x {row['tokens']}",
                f"{row['dense_bytes'] / 1e6:.1f} MB",
                f"{row['packed_bytes'] / 1e6:.1f} MB",
                f"{row['dense_speed']:,.0f}",
                f"{row['packed_speed']:,.0f}",
                f"{row['ratio']:.2f}",
                f"{row['difference']:.0e}",
            )
        console.print(table)
        console.print(f"\nThe report is in {output / 'report.html'}.")


def _print_report(report: secateur.Report, output: Path) -> None:
    console = _console()
    table = Table("layer", "shape", "pattern", box=None)
    for heading in ("sparsity", "relative error", "seconds"):
        table.add_column(heading, justify="right")
    for layer in report.layers:
        error = "" if layer.relative_error is None else f"{layer.relative_error:.4f}"
        shape = f"{layer.shape[0]} x {layer.shape[1]}"
        table.add_row(escape(layer.name), shape, layer.pattern, f"{layer.sparsity:.2%}", error, f"{layer.seconds:.2f}")
    console.print(table)
    for skip in report.skipped:
        if skip.reason not in ("no weight matrix", "excluded", "not included"):
            console.print(f"skipped {escape(skip.name or '(root)')}: {escape(skip.reason)}")
    for layer in report.layers:
        for note in layer.notes:
            console.print(f"{escape(layer.name)}: {escape(note)}")
    if report.evaluation is not None:
        e = report.evaluation
        console.print(f"\n{e.metric}: {e.before:.4g} before, {e.after:.4g} after, on {e.tokens:,} tokens")
    console.print(f"{report}\nwritten to {output}")


def _console() -> Console:
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what a user can mend into one message and exit status 2."""
    try:
        yield
    except (SparsityError, ImportError) as error:
        print(f"secateur: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        print("secateur: interrupted; nothing was written.", file=sys.stderr)
        raise typer.Exit(130) from None


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """PyTorch's number of threads for a while."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)


class _Rate(ProgressColumn):
    """Units a second, or seconds a unit where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="progress.data.speed")


@contextmanager
def _progress() -> Iterator[Callable[[str, float, float], None]]:
    """A bar with rate and remaining time on a terminal; otherwise plain lines, one for each tenth of a phase."""
    console = Console(stderr=True, highlight=False)
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("")

            def show(description: str, done: float, total: float) -> None:
                if done < bar.tasks[0].completed or total != bar.tasks[0].total:
                    bar.reset(task)  # a new phase has a rate of its own
                bar.update(task, description=escape(description), completed=done, total=total)

            yield show
        return

    began, last = time.perf_counter(), (0.0, -1)  # the phase's total, and tenths of it that were printed

    def line(description: str, done: float, total: float) -> None:
        nonlocal last
        tenths = (total, int(10 * done / total))
        if tenths != last:
            last = tenths
            print(
                f"{time.perf_counter() - began:7.1f} s  {10 * tenths[1]:3d} %  {description}",
                file=sys.stderr,
                flush=True,
            )

    yield line
