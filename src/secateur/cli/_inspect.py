"""``secateur inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from secateur.cli._app import show, user_errors
from secateur.cli._options import AsJson
from secateur.reports import Table, TableColumn


def inspect(
    path: Annotated[Path, typer.Argument(help="A .safetensors file or a model directory.")],
    show_all: Annotated[bool, typer.Option("--all", help="List vectors too, not only matrices.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the sparsity of every stored tensor and the patterns that its zeros satisfy."""
    with user_errors():
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
        columns = (
            TableColumn("tensor"),
            TableColumn("shape", is_number=True),
            TableColumn("dtype"),
            TableColumn("sparsity", is_number=True),
            TableColumn("patterns its zeros satisfy"),
        )
        cells = tuple(
            (
                summary.name,
                " x ".join(map(str, summary.shape)),
                summary.dtype,
                f"{summary.sparsity:.2%}",
                ", ".join(map(str, summary.patterns)),
            )
            for summary in found
        )
        show(Table(str(path), columns, cells))
