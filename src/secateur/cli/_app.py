"""What all commands share: the program, its exit status, progress, tables on a terminal, threads."""

from __future__ import annotations

import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Protocol, TextIO

import rich.table
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
from rich.text import Text

import secateur
from secateur._errors import SparsityError
from secateur.cli._messages import in_options
from secateur.reports import SkippedLayer, Table

app = typer.Typer(
    help="Make PyTorch models sparse and get the benefit.", no_args_is_help=True, pretty_exceptions_enable=False
)

# Modules that every model has, or that the user excluded: the terminal does not list them.
_OBVIOUS = ("no weight matrix", "excluded", "not included")


def main() -> None:
    """Run the command. A user's mistake ends with one message and exit status 2, an interrupt with 130, SIGTERM 143."""
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


@contextmanager
def user_errors(work: Path | None = None) -> Iterator[None]:
    """Turn what a user can mend into one message and exit status 2, an interrupt into 130, and SIGTERM into 143.

    The message says what was written before that. What is not complete is deleted. Warnings become messages, too.

    Args:
        work: output of a command that keeps its work beside it, and goes on from there; the message says so.
    """
    from secateur.files import note_written, work_path

    with note_written() as written, _termination_is_raised() as terminated, _plain_warnings():
        try:
            yield
        except BrokenPipeError:
            raise  # nobody reads any more, which ends the command without a word
        except (SparsityError, ImportError, OSError) as error:
            done = _listed(written())
            print(
                f"secateur: {in_options(str(error))}" + (f"\nWritten before that: {done}." if done else ""),
                file=sys.stderr,
            )
            raise typer.Exit(2) from None
        except KeyboardInterrupt:  # what caught one to tidy up may have raised another
            done = _listed(written())
            what, status = ("terminated", 143) if terminated() else ("interrupted", 130)
            done = f"{done} was written before that, and is complete" if done else "nothing was written"
            print(f"secateur: {what}; {done}.", file=sys.stderr)
            if work is not None and (kept := work_path(work)).is_dir():
                print(f"What was done so far is in {kept}. The same command goes on from there.", file=sys.stderr)
            raise typer.Exit(status) from None


def _listed(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


class _Terminated(KeyboardInterrupt):
    """SIGTERM: what cleans up after an interrupt does so after this, too. What keeps its best state ends at once."""


@contextmanager
def _termination_is_raised() -> Iterator[Callable[[], bool]]:
    """Raise an interrupt on SIGTERM, unless the program around us has decided what it does. Yield whether it came."""
    came = False

    def stop(number: int, frame: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning
        raise _Terminated

    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield lambda: came
        return
    signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Print each of our own warnings once, without the line of code that it comes from."""
    package = str(Path(secateur.__file__).parent)
    said: set[str] = set()

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not filename.startswith(package):
            usual(message, category, filename, lineno, file, line)
        elif str(message) not in said:
            said.add(str(message))
            print(f"secateur: {in_options(str(message))}", file=sys.stderr)

    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.showwarning = show_warning
        yield


@contextmanager
def use_threads(number: int | None) -> Iterator[None]:
    """Set PyTorch's number of threads for a while; None leaves it."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(number or before)
        yield
    finally:
        torch.set_num_threads(before)


def console() -> Console:
    """Return what prints to stdout, with a fixed width where that is not a terminal."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def show(*tables: Table) -> None:
    """Print tables without their empty columns, and notes below them. A table without rows is left out."""
    out = console()
    for table in tables:
        if not table.rows:
            continue
        grid = rich.table.Table(box=None, title=Text(table.title), title_justify="left", title_style="bold")
        shown = [index for index in table.filled() if not table.columns[index].is_note]
        for index in shown:
            column = table.columns[index]
            grid.add_column(Text(column.heading), justify="right" if column.is_number else "left")
        for number, row in enumerate(table.rows):
            grid.add_row(
                *(Text(in_options(row[i]), style="bold" if (number, i) in table.strong else "") for i in shown)
            )
        out.print(grid)
        for index in (index for index in table.filled() if table.columns[index].is_note):
            for row in table.rows:
                if row[index]:
                    out.print(Text(f"{row[0]}: {in_options(row[index])}"))
        for note in table.notes:
            out.print(Text(note))
        out.print()


def say(text: str) -> None:
    """Print text to stdout."""
    console().print(Text(in_options(text)))


def worth_saying(skipped: Sequence[SkippedLayer]) -> list[SkippedLayer]:
    """Return the skipped modules whose reason may surprise the user."""
    return [entry for entry in skipped if entry.reason not in _OBVIOUS]


class _Rate(ProgressColumn):
    """Steps a second, or seconds a step where that reads better."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="progress.data.speed")


@contextmanager
def show_progress() -> Iterator[Callable[[str, float, float], None]]:
    """Yield a function that shows progress on stderr, called with a description, and how much of how much is done.

    On a terminal it draws a bar with rate and remaining time. Otherwise it prints a line for each tenth of a phase.
    """
    err = Console(stderr=True, highlight=False)
    if err.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), _Rate(), TimeRemainingColumn())
        with Progress(*columns, console=err, transient=True) as bar:
            task = bar.add_task("")

            def draw(description: str, done: float, total: float) -> None:
                if done < bar.tasks[0].completed or total != bar.tasks[0].total:
                    bar.reset(task)  # a new phase has a rate of its own
                bar.update(task, description=escape(description), completed=done, total=total)

            yield draw
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


class _AnyReport(Protocol):
    """A report of any command."""

    def to_html(self) -> str:
        """One page."""

    def to_json(self) -> str:
        """JSON text."""


def written_or_printed(report: _AnyReport, html: Path | None, as_json: bool) -> bool:
    """Write a report as a page and print it as JSON, where these are asked for; return whether it was printed."""
    from secateur.files import write_text

    if html is not None:
        write_text(html, report.to_html())
    if as_json:
        print(report.to_json())
    return as_json
