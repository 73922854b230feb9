"""``secateur demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import say, show, show_progress, user_errors
from secateur.cli._options import AsJson


def demo(
    output: Annotated[Path, typer.Option(help="Directory for the report page and figures.")] = Path("demo-output"),
    as_json: AsJson = False,
) -> None:
    """Prune the small language model that comes with secateur, by every method, compare, and run the result packed."""
    with user_errors():
        from secateur.demo import packed_runs_table, run, run_packed
        from secateur.reports import Comparison, comparison_table

        if not as_json:
            say("Pruning a small language model trained on Python source; perplexity on held-out modules.\n")
        with show_progress() as progress:
            rows = run(output, progress)
        with show_progress() as progress:
            packed = run_packed(progress)
        if as_json:
            print(json.dumps({"pruned": rows, "packed": packed}, indent=1))
            return
        show(comparison_table([Comparison(**row) for row in rows]), packed_runs_table(packed))
        say(f"The report is in {output / 'report.html'}.")
